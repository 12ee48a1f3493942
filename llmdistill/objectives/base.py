"""What every objective is: a module that turns student, teacher and sequences into a LossSum."""

from __future__ import annotations

import abc

from torch import nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.protocols import Need


class Objective(nn.Module, abc.ABC):
    """One term of the loss.  Its parameters, if it has any, are trained along and not exported.

    `needs` is what the teacher must provide.  `compares_samples` says that the value depends on
    which samples share a micro-batch.  `weight` multiplies the term in the total.
    """

    name: str
    needs: frozenset[Need] = frozenset()
    compares_samples: bool = False

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abc.abstractmethod
    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Summed over the N predicted tokens of a micro-batch, in nats.  `signal` is None where
        `needs` is empty.
        """
