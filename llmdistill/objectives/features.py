"""Objectives on hidden states: the student's inner states match the teacher's.

B = sequences, T = tokens, N = predicted tokens or all that are not padding, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.models.taps import Need, Tokens
from llmdistill.objectives.base import Objective
from llmdistill.objectives.choices import choose
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Distance = Callable[[Tensor, Tensor], Tensor]  # (student_NH, teacher_NH) -> (N,)


def mse(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """The mean of squared differences over the hidden size: (N,).  Romero et al. 2015, eq. 3."""
    return (student_NH - teacher_NH).square().mean(-1)


def cosine(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """1 - cos of the angle between the states: (N,), in [0, 2].  Sanh et al. 2019, section 2."""
    return 1 - nn.functional.cosine_similarity(student_NH, teacher_NH, dim=-1)


DISTANCES: dict[str, Distance] = {"mse": mse, "cosine": cosine}


class HiddenObjective(Objective):
    """The student's hidden states after one layer match the teacher's after another.

    Layers count from 1; 0 are the embeddings, -1 is the last layer, before the final norm.  If the
    models differ in width, a linear projector without a bias is trained along, from the student's
    width to the teacher's (Romero et al. 2015, section 2.2).  The sum runs over the predicted
    tokens, or over all tokens of prompt and response with `tokens="all"`.
    """

    name = "hidden"

    def __init__(
        self,
        distance: str | Distance = "mse",
        *,
        student_layer: int = -1,
        teacher_layer: int = -1,
        tokens: Tokens = "predicted",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        self.distance = choose("distance", distance, DISTANCES)
        self.tokens = tokens
        self.student_need = Need.HIDDEN.after(student_layer, tokens)
        self.teacher_need = Need.HIDDEN.after(teacher_layer, tokens)
        self.student_needs = frozenset({self.student_need})
        self.teacher_needs = frozenset({self.teacher_need})
        self.projector: nn.Module = nn.Identity()

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        assert teacher is not None  # it provides hidden states
        if student.hidden_size != teacher.hidden_size:
            self.projector = nn.Linear(student.hidden_size, teacher.hidden_size, bias=False)

    def divisor(self, sequences: Sequences) -> Tensor:
        if self.tokens == "all":
            return sequences.trained_mask_BT.sum()
        return super().divisor(sequences)

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        assert signal is not None
        projected = wide(self.projector(student.states[self.student_need]))
        wanted = wide(signal.states[self.teacher_need])
        return LossSum(self.distance(projected, wanted).sum(), self.divisor(sequences))


def wide(states: Tensor) -> Tensor:
    """In float32, or as they are if they are wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
