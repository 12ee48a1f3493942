"""The base class of objectives: modules that return one term of the loss as a LossSum."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from llmdistill.batch import LossSum as LossSum
from llmdistill.batch import Sequences, StudentView, TeacherSignal
from llmdistill.models.taps import Need as Need
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.protocols import Progress
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Objective(nn.Module, abc.ABC):
    """One term of the loss.

    An objective may have parameters, such as a projector.  They are trained with the student and
    saved in checkpoints, but they are not exported.  `weight` multiplies the term's mean in the
    loss: a number, or a schedule over the run.  `projector_learning_rate` is the learning rate of
    the objective's parameters; None is that of the student.
    """

    name: str
    """The column of the log that shows the term's mean."""
    student_needs: frozenset[Need] = frozenset()
    """What a forward pass of the student must provide.  Before `prepare`, kinds are enough."""
    teacher_needs: frozenset[Need] = frozenset()
    """What a forward pass of the teacher must provide.  Before `prepare`, kinds are enough."""
    reaches_the_head: bool = True
    """Whether its loss has a gradient to the last layer and the head, if it needs logits."""
    compares_samples: bool = False
    """Whether the value depends on which samples share a micro-batch."""
    least_rows: int = 1
    """Rows of a batch over all ranks without which there is nothing to compare."""

    advised_rows: int = 1
    """Rows of a batch over all ranks below which the method has little to compare."""

    def __init__(
        self, *, weight: float | Schedule = 1.0, projector_learning_rate: float | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.projector_learning_rate = projector_learning_rate

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers and create the projectors, which depend on the models' sizes.

        The method is called once, before the first step and before the needs are used.  `student`
        and `teacher` are the text configurations of the models; `teacher` is None if the teacher
        has none.  Random parameters may be drawn from the global generator here, because all ranks
        seed it the same.
        """

    def start_from(self, student: PreTrainedModel) -> None:
        """Copy parts of the student, if the objective starts with some; called after `prepare`."""

    def exported(self, student: PreTrainedModel) -> PreTrainedModel | None:
        """Return the model to export if it is not the whole student; None if it is."""
        return None

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return what this batch adds to the divisor of the step: (), an integer tensor.

        The trainer sums it over micro-batches and ranks, and divides the sum of the losses by the
        result.  The default is the number of predicted tokens.
        """
        return predicted_tokens(sequences)

    @abc.abstractmethod
    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the sum of the losses over one micro-batch, in nats for distributions.

        Args:
            student: The student's output, with the states that `student_needs` lists.
            signal: The teacher's output, with everything that `teacher_needs` lists.  It is None if
                no objective of the run needs anything from the teacher.
            sequences: The batch that both models read.
        """


class Passes(Protocol):
    """Further forward passes of both models within a training step, for `AugmentedObjective`."""

    @property
    def progress(self) -> Progress:
        """The progress of training, from which all randomness follows."""

    def student(self, sequences: Sequences, needs: frozenset[Need]) -> StudentView:
        """Run the student on other sequences, or on other embeddings of them, with gradients."""

    def teacher(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Run the teacher on them, without gradients."""

    def teacher_with_gradients(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Run the teacher on them, with gradients to what `embedding_change` returns."""
