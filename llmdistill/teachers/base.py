"""A teacher that trains along with the student."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor, nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.models.taps import Need
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class TrainableTeacher(nn.Module, abc.ABC):
    """A teacher with parameters that learn from its own loss, from the same pair of forward passes.

    It is a part of the trained module: its parameters with `requires_grad` get their own optimiser
    group and gradient clipping, named `teacher`, and are saved in checkpoints.  They are not
    exported with the student.  Gradients never cross: the objectives see a signal without a way
    back, and `forward` sees a student without one.
    """

    provides: ClassVar[frozenset[Need]] = frozenset()
    own_needs: frozenset[Need] = frozenset({Need.DISTRIBUTION})
    """What its own loss takes from its own signal."""
    student_needs: frozenset[Need] = frozenset({Need.DISTRIBUTION})
    """What its own loss takes from the student."""
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig | None = None
    weight: float | Schedule = 1.0

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, as every teacher does: dropout would make its targets noise."""
        return super().train(False)

    @abc.abstractmethod
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """As any teacher, but with gradients: what it gives leads back to its parameters."""

    @abc.abstractmethod
    def forward(self, student: StudentView, signal: TeacherSignal, sequences: Sequences) -> LossSum:
        """The teacher's own loss on a micro-batch, from its own signal and a detached student."""

    def divisor(self, sequences: Sequences) -> Tensor:
        """What this batch adds to the number that the step's sum is divided by: (), an integer."""
        return predicted_tokens(sequences)
