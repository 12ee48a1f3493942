"""Measures models on held-out prompts: the figures of `evaluation.json`.

B = sequences.

The teacher's greedy answers to the evaluation prompts are the reference, and are written once.
Each model is then measured against them with the same prompts, lengths and random draws.  The ranks
share the prompts, so every rank must make each call, and every rank gets the figures of all.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import PartialState
from torch import nn

from llmdistill.batch import Prompts, Sequences
from llmdistill.data.collate import PromptDataset
from llmdistill.data.context import room
from llmdistill.data.render import last_messages
from llmdistill.data.table import Row
from llmdistill.decoding.sample import sample
from llmdistill.errors import DataError, RecipeError
from llmdistill.evaluation.agreement import Judged, agreement, judge, perplexity
from llmdistill.evaluation.batches import PromptBatches
from llmdistill.evaluation.ranks import from_first, of_all_rows
from llmdistill.evaluation.text import exact_match, repeated_ngrams, rouge_l
from llmdistill.evaluation.tokens import Position, positions
from llmdistill.models.footprint import num_bytes
from llmdistill.models.heads import eval_mode
from llmdistill.models.load import default_device, preferred_dtype
from llmdistill.models.sharding import has_sharded_weights
from llmdistill.models.taps import Need
from llmdistill.models.vocabulary import num_tokens
from llmdistill.protocols import Teacher, Writes, plain
from llmdistill.sampling import GREEDY, Draw, Sampling, Writer
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMED_ROWS = 8  # rows in the one batch whose tokens per second are measured
WARM_UP_TOKENS, TIMED_TOKENS = 2, 48  # the warm-up is not counted
TIMES = 3  # the best of this many times counts


@dataclass(frozen=True)
class Figures:
    """Figures of one model; MEANING describes each.

    A figure that has no meaning for the rows is None: `perplexity` and `rouge_l_references` without
    references, `exact_match` without an answer pattern, and measures of words without any.
    """

    kl_teacher_text: float
    kl_own_text: float
    top1_agreement: float
    draft_acceptance: float
    rouge_l_teacher: float | None
    rouge_l_references: float | None
    exact_match: float | None
    perplexity: float | None
    repeated_4grams: float | None
    num_parameters: int
    num_bytes: int
    tokens_per_second: float
    dtype: str


# These texts are shown on model cards.
MEANING = {
    "kl_teacher_text": "forward KL per token on the teacher's greedy responses, nats",
    "kl_own_text": "forward KL per token on the model's own samples, nats",
    "top1_agreement": "share of tokens where both rank the same token first",
    "draft_acceptance": "share of drafted tokens that speculative decoding would accept",
    "rouge_l_teacher": "ROUGE-L of greedy responses against the teacher's",
    "rouge_l_references": "ROUGE-L of greedy responses against the dataset's",
    "exact_match": "share of greedy responses with the result of the reference",
    "perplexity": "perplexity on the dataset's responses",
    "repeated_4grams": "share of repeated 4-grams in greedy responses",
    "num_parameters": "number of parameters",
    "num_bytes": "size of the weights in bytes",
    "tokens_per_second": "tokens per second at batch size 8 on the training machine, best of three",
    "dtype": "dtype in which the model was measured",
}


def remarks(evaluation: Mapping[str, Figures]) -> list[str]:
    """Return a sentence for each way in which the student is no better off than its teacher."""
    if not {"after", "teacher"} <= set(evaluation):
        return []
    student, teacher = evaluation["after"], evaluation["teacher"]
    found = []
    if student.num_bytes > teacher.num_bytes:
        sizes = f"{student.num_bytes / 1e6:.0f} MB and {teacher.num_bytes / 1e6:.0f} MB"
        found.append(f"The student is larger than its teacher: {sizes}.")
    if student.tokens_per_second < teacher.tokens_per_second:
        speeds = f"{student.tokens_per_second:.0f} and {teacher.tokens_per_second:.0f}"
        found.append(f"The student is slower than its teacher: {speeds} tokens per second.")
    return found


@dataclass(frozen=True)
class Written:
    """Greedy responses of one model: this rank's in batches, and all in the prompts' order."""

    batches: list[Sequences]
    responses: list[list[int]]
    texts: list[str]


class Measurement(NamedTuple):
    """Figures of one model, and its greedy response to each prompt."""

    figures: Figures
    responses: list[str]


class Evaluation:
    """Measures models against one teacher on one set of prompts and their responses.

    The constructor writes and scores the teacher's answers, which takes a while.  Raises
    RecipeError for a teacher that cannot write or provides no distributions, and DataError if a
    response lacks the result that `answer_pattern` finds.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        seed: int,
        answer_pattern: str | None = None,
    ) -> None:
        if answer_pattern is not None and prompts.responses is None:
            raise DataError(
                "evaluate.answer_pattern: some evaluation rows have no response to compare with. "
                "Add responses, or remove the pattern."
            )
        # A teacher may train a student with other distributions than those of its model.
        teacher = plain(teacher)
        self.teacher = teacher
        # Ranks that share the weights of the teacher make the same passes, on the same prompts.
        self.alike = has_sharded_weights(_local_model(teacher))
        self.prompts = prompts
        self._batches = PromptBatches(prompts, max_new_tokens, self.alike)
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.answer_pattern = answer_pattern
        # Writing takes minutes, so a reference without a result is reported before it.
        if answer_pattern is not None:
            exact_match(self._references(), self._references(), answer_pattern)
        if not isinstance(teacher, Writes):
            raise RecipeError(
                "evaluation compares the student with the teacher's answers, but a "
                f"{type(teacher).__name__} cannot write. Remove the evaluation rows."
            )
        if Need.DISTRIBUTION not in teacher.provides:
            raise RecipeError(
                f"evaluation compares distributions, but a {type(teacher).__name__} provides none. "
                "Remove the evaluation rows."
            )
        self.reference = self._greedy(teacher.write)
        self._judged = judge(teacher, self.reference.batches)
        # `judge` drops the signal of the batches; keeping it here would keep it in GPU memory.
        self.reference = replace(self.reference, batches=[one.sequences for one in self._judged])

    @property
    def device(self) -> torch.device:
        """The device on which models are measured."""
        model = _local_model(self.teacher)
        return default_device() if model is None else model.device

    def measured_dtype(self) -> torch.dtype:
        """Return the dtype in which a student is measured: its teacher's, to compare speeds."""
        model = _local_model(self.teacher)
        if model is not None and not getattr(model, "is_quantized", False):
            return model.dtype
        return preferred_dtype(self.device)

    def digest(self) -> str:
        """Return a hash of what the figures of a student depend on."""
        rows = (self.prompts.ids(), self.prompts.responses, self.reference.responses)
        known = repr((rows, self.max_new_tokens, self.seed, self.answer_pattern))
        return hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()

    def teacher_figures(self) -> dict[str, Figures]:
        """Return the teacher's figures against itself under "teacher", or {} if it is not local."""
        # A teacher that reads more than the student is not the model that is measured here.
        if not isinstance(self.teacher, LocalTeacher) or getattr(self.teacher, "reads_more", False):
            return {}
        with self.teacher.in_use() as model:
            return {"teacher": self._figures(model, self.reference, self._judged)}

    def teacher_text(self) -> PromptDataset:
        """Return the prompts with the teacher's greedy responses, for the held-out loss."""
        columns = (self.prompts.row_ids_B.tolist(), self.prompts.ids(), self.reference.responses)
        return PromptDataset([Row(*row) for row in zip(*columns, strict=True)])

    def looked_at(self, model: PreTrainedModel, most: int) -> list[tuple[str, list[Position]]]:
        """Return the first rank's first prompts with the positions of the teacher's answers.

        Every rank must call it.  The other ranks get their own rows.
        """
        if not self._judged:
            return []
        tokenizer, places = self.teacher.tokenizer, next(iter(self._batches.places()))
        first = sorted(range(len(places)), key=places.__getitem__)[:most]
        with eval_mode(model):
            judged = self._judged[0].select(torch.tensor(first))
            found = positions(model, judged, tokenizer, num_tokens(tokenizer))
        ids = self.prompts.ids()
        prompts = last_messages(tokenizer, [ids[places[row]] for row in first])
        return list(zip(prompts, found, strict=True))

    def measure(
        self, model: PreTrainedModel, exported_as: torch.dtype | None = None
    ) -> Measurement:
        """Write with a model and return its figures and its greedy responses.

        `exported_as` is the dtype of its weights in files, if it is another one.
        """
        write = functools.partial(sample, model, self.teacher.tokenizer, writer=Writer.STUDENT)
        device = next(model.parameters()).device
        # Text is written in the model's own dtype, whatever autocast context the caller is in.
        with torch.autocast(device.type, enabled=False):
            written = self._greedy(write)
            # Temperature 1: `kl_own_text` is an expectation over the model's own distribution.
            own = self._write(write, Sampling())
        with eval_mode(model):
            figures = self._figures(model, written, judge(self.teacher, own))
        size = num_bytes(model, exported_as)
        return Measurement(replace(figures, num_bytes=size), written.texts)

    def _figures(self, model: PreTrainedModel, written: Written, own: list[Judged]) -> Figures:
        # Heads can have padding rows beyond the tokenizer, which must not take part in a softmax.
        shared = num_tokens(self.teacher.tokenizer)
        on_teacher = agreement(model, self._judged, shared)
        on_own = agreement(model, own, shared)
        texts, references = written.texts, self._references()
        pattern = self.answer_pattern
        return Figures(
            kl_teacher_text=on_teacher.forward_kl,
            kl_own_text=on_own.forward_kl,
            top1_agreement=on_teacher.top1,
            draft_acceptance=on_teacher.acceptance,
            rouge_l_teacher=rouge_l(texts, self.reference.texts),
            rouge_l_references=rouge_l(texts, references) if references else None,
            exact_match=exact_match(texts, references, pattern) if pattern else None,
            perplexity=perplexity(model, self._batches.given(), shared) if references else None,
            repeated_4grams=repeated_ngrams(texts, 4),
            num_parameters=model.num_parameters(),
            num_bytes=num_bytes(model),
            tokens_per_second=from_first(self._speed(model)),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def _greedy(self, write: Callable[..., Sequences]) -> Written:
        batches = self._write(write, GREEDY)
        places = [place for some in self._batches.places() for place in some]
        ids = [ids for some in batches for ids in some.responses()]
        own = [one for _, one in sorted(zip(places, ids, strict=True))]
        responses = of_all_rows(own, len(self.prompts), alike=self.alike)
        return Written(batches, responses, self._decode(responses))

    def _speed(self, model: PreTrainedModel) -> float:
        """Return the tokens per second in a batch of TIMED_ROWS rows, the best of TIMES.

        No row ends early, so the speed does not depend on what the model writes.  Only the first
        rank is timed: processes on one machine would slow each other down.
        """
        if not (PartialState().is_main_process or self.alike):
            return 0.0
        limit = room(model.config.get_text_config(), 0)
        timed = int(min(TIMED_TOKENS, limit // 2))
        # The end of a prompt that would leave no room.
        some = [
            ids[-int(min(limit - timed, len(ids))) :] for ids in self.prompts.ids()[:TIMED_ROWS]
        ]
        prompts = Prompts.pack(some, range(len(some)), pad_id=0)
        seconds = []
        for number in (min(WARM_UP_TOKENS, timed), *[timed] * TIMES):
            start = time.perf_counter()
            with torch.autocast(next(model.parameters()).device.type, enabled=False):
                sample(
                    model,
                    self.teacher.tokenizer,
                    prompts,
                    GREEDY,
                    max_new_tokens=number,
                    draw=Draw(self.seed),
                    writer=Writer.STUDENT,
                    stops=False,
                )
            seconds.append(time.perf_counter() - start)
        return len(some) * timed / min(seconds[1:])

    def _write(self, write: Callable[..., Sequences], sampling: Sampling) -> list[Sequences]:
        """Return the answers to this rank's prompts, in batches."""
        return [
            write(some, sampling, max_new_tokens=self.max_new_tokens, draw=Draw(self.seed))
            for some in self._batches
        ]

    def _references(self) -> list[str]:
        return self._decode(self.prompts.responses or ())

    def _decode(self, answers: Iterable[Iterable[int]]) -> list[str]:
        decode = self.teacher.tokenizer.decode
        return [decode(list(ids), skip_special_tokens=True) for ids in answers]


def _local_model(teacher: Teacher) -> PreTrainedModel | None:
    """Return the model of a teacher on this machine; one on a server has a name instead."""
    model = getattr(teacher, "model", None)
    return model if isinstance(model, nn.Module) else None
