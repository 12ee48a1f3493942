"""The student as its own teacher: with other weights, or with a context that it does not see.

B = rows, T = tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.decoding.session import Session
from llmdistill.errors import DataError, RecipeError
from llmdistill.models.heads import eval_mode
from llmdistill.models.taps import Need
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The weights that a teacher can have.  Recipes read the names with `ast`.
WEIGHTS = {"base": "as at the start", "ema": "moving average", "live": "as they are now"}


class ReflexiveTeacher(LocalTeacher):
    """The student as a teacher, with its first, averaged or current weights.

    With `prompts` the teacher reads another prompt than the student before the same response
    (Zhao et al. 2026, OPSD; Shenfeld et al. 2026, SDFT).  The responses are aligned row by row.
    The student's model is used, with other values of the trained weights while the teacher runs.
    So only these weights are in memory twice.

    Args:
        student: The model that is trained, plain or with an adapter.
        tokenizer: Its tokenizer.
        weights: "base" for the weights that the student starts with, "ema" for their moving
            average, or "live" for the current ones.
        ema_rate: Share r of the new weights: after each step, average <- (1 - r) average + r new.
        export_ema: Whether the average is exported as the student.
        prompts: The ids of the teacher's prompt by row id.  None is the student's own prompts.

    Raises:
        RecipeError: The name of the weights is unknown, or there is no average to export.
    """

    scores_anew: ClassVar[bool] = True  # the weights change, and what it wrote from may be old

    def __init__(
        self,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        weights: str = "base",
        ema_rate: float = 0.05,
        export_ema: bool = False,
        prompts: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        if weights not in WEIGHTS:
            raise RecipeError(f"unknown weights '{weights}'. Use one of {', '.join(WEIGHTS)}.")
        if export_ema and weights != "ema":
            raise RecipeError("export_ema needs weights='ema'. Without it there is no average.")
        # Not `super().__init__`, which would freeze the student.
        self._take(student, tokenizer)
        self.weights, self.ema_rate, self.export_ema = weights, ema_rate, export_ema
        self.prompts = prompts
        self._start = _copies(student, "cpu") if weights != "base" else {}
        self._kept = _copies(student, self.device) if weights != "live" else {}

    @property
    def plain(self) -> ReflexiveTeacher:
        """The same teacher with the weights that the student started with."""
        if self.weights == "base":
            return self
        fixed = ReflexiveTeacher.__new__(ReflexiveTeacher)
        vars(fixed).update(vars(self))
        fixed.weights, fixed._start, fixed._kept = "base", {}, self._start
        return fixed

    @property
    def reads_more(self) -> bool:
        """Whether the teacher reads prompts that the student does not see."""
        return self.prompts is not None

    @property
    def reads_changes(self) -> bool:  # type: ignore[override]
        """Whether the teacher reads what the student reads, so that both can read changes of it."""
        return not self.reads_more

    @contextlib.contextmanager
    def in_use(self) -> Iterator[PreTrainedModel]:
        """Give the student's model in eval mode with the teacher's weights."""
        with super().in_use() as model, eval_mode(model), _swapped(model, self._kept):
            yield model

    def after_step(self) -> None:
        """Move the average towards the student's weights."""
        if self.weights == "ema":
            for name, value in _trained(self.model).items():
                kept = self._kept[name].to(value.device)
                self._kept[name] = kept.lerp_(value.detach().to(kept.dtype), self.ema_rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moving average by the names of the student's weights, if there is one."""
        return dict(self._kept) if self.weights == "ema" else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the moving average."""
        self._kept = {name: value.to(self._kept[name].device) for name, value in state.items()}

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Give the student the average inside the context, if that is what is exported."""
        with _swapped(self.model, self._kept if self.export_ema else {}):
            yield

    @torch.no_grad()
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens, each after the prompt that the teacher reads.

        Raises DataError if the teacher has no prompt for a row.
        """
        if self.prompts is not None:
            sequences = reprompted(sequences, self._prompts_of(sequences.row_ids_B))
        with self.in_use():
            # Cut off here, because afterwards the head's parameter has the student's weights again.
            return super().judge(sequences, needs).detach()

    def write(
        self,
        prompts: Prompts,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        draw: Draw,
        stop: str = "",
    ) -> Sequences:
        """Write one response to each prompt, and return it after the prompt of the student."""
        written = super().write(
            self._seen(prompts), sampling, max_new_tokens=max_new_tokens, draw=draw, stop=stop
        )
        if self.prompts is None:
            return written
        ids = (prompts.ids(), written.responses(), prompts.row_ids_B.tolist())
        return Sequences.pack(*ids, writer=Writer.TEACHER, pad_id=0)

    def session(self, prompts: Prompts) -> AbstractContextManager[Session]:
        """Raise RecipeError: student and teacher cannot take turns in one model."""
        raise RecipeError(
            "a ReflexiveTeacher cannot take part in an interleaved rollout, because both models "
            "would keep their caches and packed weights in one model. Use SampledRollout."
        )

    def _seen(self, prompts: Prompts) -> Prompts:
        """Return the prompts as the teacher reads them."""
        if self.prompts is None:
            return prompts
        return Prompts.pack(
            self._prompts_of(prompts.row_ids_B), prompts.row_ids_B.tolist(), pad_id=0
        )

    def _prompts_of(self, row_ids_B: Tensor) -> list[Sequence[int]]:
        assert self.prompts is not None
        rows = row_ids_B.tolist()
        if missing := [row for row in rows if row not in self.prompts]:
            raise DataError(
                f"the teacher has no prompt for row {missing[0]}, so it cannot score that row. "
                "Build it with the prompts of all rows that are trained on or measured."
            )
        return [self.prompts[row] for row in rows]


def reprompted(sequences: Sequences, prompts: Sequence[Sequence[int]]) -> Sequences:
    """Return the same responses after other prompts, given by their ids.

    The predicted tokens keep their number and order, so a signal for the result fits `sequences`.
    """
    device = sequences.input_ids_BT.device
    tails = response_slices(sequences)
    responses = [
        ids[tail].tolist() for ids, tail in zip(sequences.input_ids_BT, tails, strict=True)
    ]
    rows = sequences.row_ids_B.tolist()
    made = Sequences.pack(prompts, responses, rows, writer=Writer.DATA, pad_id=0)
    made = made.to(device)
    mask_BT = torch.zeros_like(made.response_mask_BT)
    predicted_BT = sequences.response_mask_BT.clone()
    predicted_BT[:, :1] = False  # no state comes before the first column
    for row, tail in enumerate(tails):
        start = len(prompts[row])
        mask_BT[row, start : start + tail.stop - tail.start] = predicted_BT[row, tail]
    return replace(made, response_mask_BT=mask_BT)


def response_slices(sequences: Sequences) -> list[slice]:
    """Return the columns from each row's first response token to its end."""
    mask_BT, lengths_B = sequences.response_mask_BT, sequences.attention_mask_BT.sum(1)
    first_B = torch.where(mask_BT.any(1), mask_BT.int().argmax(1), lengths_B)
    pairs = zip(first_B.tolist(), lengths_B.tolist(), strict=True)
    return [slice(first, end) for first, end in pairs]


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _copies(model: PreTrainedModel, device: torch.device | str) -> dict[str, Tensor]:
    """Return copies of the trained weights, in float32 or wider so that an average can move."""
    return {
        name: value.detach().to(device, torch.promote_types(value.dtype, torch.float32), copy=True)
        for name, value in _trained(model).items()
    }


@contextlib.contextmanager
def _swapped(model: PreTrainedModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model other weights inside the context."""
    named = dict(model.named_parameters())
    own = {name: named[name].data for name in values}
    try:
        for name, value in values.items():
            named[name].data = value.to(own[name].device, own[name].dtype)
        yield
    finally:
        for name, value in own.items():
            named[name].data = value
