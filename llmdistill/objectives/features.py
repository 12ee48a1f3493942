"""Objectives on hidden states: the student's inner states match the teacher's.

B = sequences, T = tokens, H = hidden size, N = predicted tokens, or all tokens of the rows that
have one.
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
    """Compute the mean squared difference of the hidden states.

    sum_H (student - teacher)^2 / H, for each token: (N,).  Romero et al. 2015 (FitNets), eq. 3
    up to a constant factor.  There are no options.
    """
    return (student_NH - teacher_NH).square().mean(-1)


def cosine(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Compute the cosine distance of the hidden states, which ignores their length.

    1 - cos of the angle between student and teacher, for each token: (N,), from 0 to 2.  Sanh et
    al. 2019 (DistilBERT), section 2.  There are no options.
    """
    return 1 - nn.functional.cosine_similarity(student_NH, teacher_NH, dim=-1)


# Recipes read the names with `ast`, so the table must stay a dict literal.
DISTANCES: dict[str, Distance] = {"mse": mse, "cosine": cosine}


class HiddenObjective(Objective):
    """A distance between hidden states of the student and of the teacher.

    The states are those after one decoder layer of each model.  If the models differ in width, a
    linear projector without a bias, from the student's width to the teacher's, is trained with the
    student (Romero et al. 2015, section 2.2).  Distances are summed in float32 or wider.

    Args:
        distance: "mse", "cosine", or a function of two (N, H) tensors, the student's first, that
            returns (N,).
        student_layer: The layer of the student.  Layers count from 1.  0 is the embeddings, and -1
            is the last layer, before the final norm.
        teacher_layer: The layer of the teacher, counted the same way.
        tokens: "predicted" for the states that predict the response, or "all" for the states at
            every token of prompt and response.  The sum is divided by the number of these tokens.
        weight: Factor on the objective's mean: a number, or a schedule over the run.

    Raises:
        RecipeError: If the distance is unknown.  A layer that a model does not have raises
            ModelError when the trainer is built.
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
        # `prepare` replaces it, because the widths are not known before.
        self.projector: nn.Module = nn.Identity()

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Create the projector if the models differ in width."""
        assert teacher is not None  # A teacher that provides hidden states has a configuration.
        if student.hidden_size != teacher.hidden_size:
            self.projector = nn.Linear(student.hidden_size, teacher.hidden_size, bias=False)

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return the number of tokens that the sum runs over: ()."""
        if self.tokens == "all":
            return sequences.trained_mask_BT.sum()
        return super().divisor(sequences)

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the sum of the distances over one micro-batch."""
        assert signal is not None
        projected = wide(self.projector(student.states[self.student_need]))
        wanted = wide(signal.states[self.teacher_need])
        return LossSum(self.distance(projected, wanted).sum(), self.divisor(sequences))


def wide(states: Tensor) -> Tensor:
    """Return the states in float32, or unchanged if their dtype is wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
