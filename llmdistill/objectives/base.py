"""What every objective is: a module that turns student, teacher and sequences into a LossSum."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmdistill.batch import LossSum as LossSum
from llmdistill.batch import Sequences, StudentView, TeacherSignal
from llmdistill.models.taps import Need as Need
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Objective(nn.Module, abc.ABC):
    """One term of the loss.  Its parameters, if it has any, are trained along and not exported.

    `student_needs` and `teacher_needs` are what one forward pass of each model must show.
    `compares_samples` says that the value depends on which samples share a micro-batch.  `weight`
    multiplies the term's mean in the loss: a number, or a schedule over the run.
    """

    name: str
    student_needs: frozenset[Need] = frozenset()
    teacher_needs: frozenset[Need] = frozenset()
    compares_samples: bool = False

    def __init__(self, *, weight: float | Schedule = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Makes what depends on the models' sizes, such as projectors; called once.

        `teacher` is None for a teacher without a configuration.  Random parameters may be drawn
        from the global generator here: it is seeded alike on all ranks.
        """

    def divisor(self, sequences: Sequences) -> Tensor:
        """What this batch adds to the number that the step's sum is divided by: (), an integer.

        By default its predicted tokens.  The trainer sums it over micro-batches and ranks.
        """
        return predicted_tokens(sequences)

    @abc.abstractmethod
    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """The sum over a micro-batch, in nats for distributions.  `signal` holds `teacher_needs`,
        and is None if no objective of the run needs anything from the teacher.
        """
