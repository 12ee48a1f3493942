"""A teacher that also sees images, for a student that reads text alone.

B = rows, T = tokens, P = prompt tokens, N = predicted tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.data.formats import Message
from llmdistill.data.table import Row
from llmdistill.decoding.sample import sample
from llmdistill.distributions import Dense
from llmdistill.errors import DataError, ModelError, RecipeError, VocabularyError
from llmdistill.models.heads import split
from llmdistill.models.taps import Need
from llmdistill.models.vocabulary import end_ids, num_tokens
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.reflexive import response_slices

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


class Seen(NamedTuple):
    """What the teacher reads of a row: the messages of the prompt, and the files of its images."""

    messages: tuple[Message, ...]
    images: tuple[Path, ...] = ()


class MultimodalTeacher:
    """A frozen model that reads images and text, and scores the response tokens of a text student.

    The teacher's prompt is the messages of the row with its images before the last message,
    rendered by its own processor.  The same response follows.  So the logits of the response tokens
    are compared although the prompts differ.  The student never receives an image.

    Args:
        model: A model that reads images and text, such as one of transformers'
            AutoModelForImageTextToText.
        processor: Its processor, with a chat template.
        seen: What the teacher reads of each row, by row id.
        tokenizer: The student's tokenizer, whose ids must mean the same to the teacher.  None is
            the teacher's own.
        template_options: Options for the chat template, such as `enable_thinking`.

    Raises:
        ModelError: The processor has no chat template.
        VocabularyError: A token has different ids in the tokenizers of student and teacher.
    """

    provides = frozenset({Need.DISTRIBUTION})
    scores_anew = True  # the head is narrowed to the student's ids
    reads_more = True

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        seen: Mapping[int, Seen] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        own = processor.tokenizer
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.seen, self.template_options = dict(seen or {}), dict(template_options or {})
        self.tokenizer = own if tokenizer is None else tokenizer
        self.num_tokens = num_tokens(self.tokenizer)
        if processor.chat_template is None and own.chat_template is None:
            raise ModelError(
                f"the processor of '{own.name_or_path}' has no chat template, so prompts with "
                "images cannot be rendered. Use an instruct model."
            )
        require_shared_ids(self.tokenizer, own)

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device

    @property
    def ends(self) -> frozenset[int]:
        """The token ids that end a response of this teacher."""
        return end_ids(self.model, self.processor.tokenizer)

    @torch.no_grad()
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens, each after the teacher's own prompt with its images.

        Raises DataError for a row whose messages and images the teacher was not given.
        """
        if Need.DISTRIBUTION not in needs:
            return TeacherSignal()
        seen = [self._seen(row) for row in sequences.row_ids_B.tolist()]
        backbone, head = split(self.model)
        # Processors do not mix rows with and without images, so each kind has its own pass.
        size = head.weight_VH.shape[1]
        counts = sequences.num_predicted.tolist()
        states: list[Tensor] = [torch.empty(0, size) for _ in counts]
        for kind in (False, True):
            rows = [row for row, one in enumerate(seen) if bool(one.images) is kind]
            if rows:
                some = sequences.select(torch.tensor(rows, device=sequences.input_ids_BT.device))
                hidden_NH = self._hidden(backbone, some, [seen[row] for row in rows])
                parts = hidden_NH.split([counts[row] for row in rows])
                for row, part in zip(rows, parts, strict=True):
                    states[row] = part
        hidden_NH = torch.cat([part.to(self.device, head.weight_VH.dtype) for part in states])
        return TeacherSignal(Dense(hidden_NH, head.narrow(self.num_tokens)))

    def write(
        self,
        prompts: Prompts,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        draw: Draw,
        stop: str = "",
    ) -> Sequences:
        """Write one response to each prompt with its images, and return it after the prompt."""
        rows = prompts.row_ids_B.tolist()
        seen = [self._seen(row) for row in rows]
        responses = self.answer(
            seen, rows, sampling, max_new_tokens=max_new_tokens, draw=draw, stop=stop
        )
        known = [[token for token in ids if token < self.num_tokens] for ids in responses]
        return Sequences.pack(prompts.ids(), known, rows, writer=Writer.TEACHER, pad_id=0)

    def answer(
        self,
        seen: Sequence[Seen],
        rows: Sequence[int],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        draw: Draw,
        stop: str = "",
    ) -> list[list[int]]:
        """Return the token ids of a response to each conversation with its images.

        `rows` are ids that key the randomness.  The other arguments are those of `write`.
        """
        responses: list[list[int]] = [[] for _ in seen]
        for kind in (False, True):
            places = [place for place, one in enumerate(seen) if bool(one.images) is kind]
            if not places:
                continue
            own = draw
            if isinstance(draw.sample, tuple):  # one number for each row
                own = replace(draw, sample=tuple(draw.sample[place] for place in places))
            inputs = self._processed([seen[place] for place in places], side="left")
            ids_BP, mask_BP = inputs.pop("input_ids"), inputs.pop("attention_mask")
            prompts = Prompts(ids_BP, mask_BP, torch.tensor([rows[place] for place in places]))
            with torch.autocast(self.device.type, enabled=False):
                written = sample(
                    self.model,
                    self.processor.tokenizer,
                    prompts,
                    sampling,
                    max_new_tokens=max_new_tokens,
                    draw=own,
                    writer=Writer.TEACHER,
                    stop=stop,
                    inputs={name: value.to(self.device) for name, value in inputs.items()},
                )
            for place, ids in zip(places, written.responses(), strict=True):
                responses[place] = ids
        return responses

    def _seen(self, row: int) -> Seen:
        if row not in self.seen:
            raise DataError(
                f"the teacher was given no messages and images for row {row}. Build it with those "
                "of all rows that are trained on or measured."
            )
        return self.seen[row]

    def _processed(self, seen: Sequence[Seen], *, side: str) -> dict[str, Tensor]:
        """Return the processor's tensors of several prompts, padded on one side."""
        own = self.processor.tokenizer
        before, own.padding_side = own.padding_side, side
        try:
            found = self.processor.apply_chat_template(
                [_conversation(one) for one in seen],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                sanitize_control_tokens=True,
                processor_kwargs={"padding": True},
                **self.template_options,
            )
        finally:
            own.padding_side = before
        dtype = self.model.dtype
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in found.items()
            if isinstance(value, Tensor)
        }

    def _hidden(self, backbone: Any, sequences: Sequences, seen: Sequence[Seen]) -> Tensor:
        """Return the final hidden states that predict the response tokens: (N, H)."""
        inputs = self._processed(seen, side="right")
        ids_BP, mask_BP = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        tails = response_slices(sequences)
        lengths = mask_BP.sum(1).tolist()
        width = max(n + t.stop - t.start for n, t in zip(lengths, tails, strict=True))
        ids_BT = torch.zeros(len(tails), width, dtype=torch.long)
        attention_BT, predicts_BT = torch.zeros_like(ids_BT), ids_BT.bool()
        # What has one number for each token of the prompt, such as the type of a token.
        by_token = {k: v for k, v in inputs.items() if v.shape[:2] == ids_BP.shape}
        longer = {k: v.new_zeros(len(tails), width, *v.shape[2:]) for k, v in by_token.items()}
        answers_BT = sequences.input_ids_BT.cpu()
        predicted_BT = sequences.response_mask_BT.cpu().clone()
        predicted_BT[:, :1] = False  # no state of the student comes before the first column
        for row, (start, tail) in enumerate(zip(lengths, tails, strict=True)):
            end = start + tail.stop - tail.start
            ids_BT[row, :start] = ids_BP[row, mask_BP[row]]
            ids_BT[row, start:end] = answers_BT[row, tail]
            attention_BT[row, :end] = 1
            predicts_BT[row, start - 1 : end - 1] = predicted_BT[row, tail]
            for name, value in by_token.items():
                longer[name][row, :start] = value[row, mask_BP[row]]
        everything = inputs | longer | {"input_ids": ids_BT, "attention_mask": attention_BT}
        moved = {name: value.to(self.device) for name, value in everything.items()}
        with torch.autocast(self.device.type, enabled=False):
            output = backbone(**moved, use_cache=False)
        return output.last_hidden_state[predicts_BT.to(self.device)]


def seen_of(rows: Sequence[Row], column: str, folder: Path | None = None) -> dict[int, Seen]:
    """Return what a teacher reads of each row, from a column with the files of its images.

    Relative files are in `folder`, or else in the working directory.  Raises DataError, which names
    the row, for a file that does not exist or is no image.
    """
    found = {}
    for row in rows:
        where = f"row {row.row_id}"
        places = images_in(folder, image_files(row.columns[column], where, column), where)
        found[row.row_id] = Seen(row.messages, places)
    return found


def images_in(folder: Path | None, files: Sequence[str], where: str) -> tuple[Path, ...]:
    """Return the paths of image files.  Raises DataError if one does not exist or is no image."""
    places = tuple((folder or Path()) / file for file in files)
    for place in places:
        _check_image(place, where)
    return places


def image_files(value: Any, where: str, column: str) -> list[str]:
    """Return the files that a row lists in a column: one, or a list of them.

    Raises DataError if the value is neither.
    """
    if value is None or value == "":  # an empty cell of a table
        return []
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise DataError(
            f"{where}: '{column}' must be the path of an image or a list of paths, "
            f"got {value!r:.50}"
        )
    return files


def _check_image(place: Path, where: str) -> None:
    """Raise DataError unless the file is an image that Pillow can open."""
    from PIL import Image

    if not place.is_file():
        raise DataError(
            f"{where}: the image '{place}' does not exist. Correct the path, or set "
            "teacher.image_folder to the folder that it starts from."
        )
    try:
        with Image.open(place) as image:
            image.verify()
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise DataError(
            f"{where}: '{place}' is no image that can be read: {error}. Replace or drop it."
        ) from error


def _conversation(seen: Seen) -> list[dict[str, Any]]:
    """Return messages in the form of a processor, with the images before the last message."""
    from PIL import Image

    pictures = []
    for place in seen.images:
        with Image.open(place) as image:
            pictures.append({"type": "image", "image": image.convert("RGB")})
    made: list[dict[str, Any]] = [
        {"role": one["role"], "content": [{"type": "text", "text": one["content"]}]}
        for one in seen.messages
    ]
    if not made:
        raise RecipeError(
            "a teacher that reads images needs rows with messages, and plain text has none. Use "
            "rows with a prompt and a response."
        )
    made[-1]["content"] = [*pictures, *made[-1]["content"]]
    return made


def require_shared_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise VocabularyError unless each token of the student has the same id for the teacher.

    The teacher may have more tokens, such as those that stand for images.
    """
    known = teacher.get_vocab()
    for token, number in student.get_vocab().items():
        if known.get(token) != number:
            raise VocabularyError(
                f"token {token!r} has id {number} in student '{student.name_or_path}' and "
                f"{known.get(token, 'none')} in teacher '{teacher.name_or_path}', so they share no "
                "vocabulary. Use a student whose tokens the teacher has, too."
            )
