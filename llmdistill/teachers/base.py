"""The base class of teachers that are trained together with the student."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.models.heads import unwrap_adapters
from llmdistill.models.layers import decoder_layers
from llmdistill.models.taps import Need
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class TrainableTeacher(nn.Module, abc.ABC):
    """A teacher with parameters that are trained with a loss of the teacher's own.

    The loss uses the forward passes of student and teacher that the objectives use.  The teacher is
    part of the trained module.  Its parameters with `requires_grad` are saved in checkpoints and
    have a separate optimizer group and gradient clipping, both named `teacher`.  They are not
    exported with the student.  Gradients never cross: objectives see a detached signal, and
    `forward` sees a detached student.
    """

    scores_anew: ClassVar[bool] = True  # its signal has gradients, unlike what it read in writing
    provides: ClassVar[frozenset[Need]] = frozenset()
    """What `judge` can return."""
    own_needs: frozenset[Need] = frozenset({Need.DISTRIBUTION})
    """What its own loss needs from its own signal."""
    student_needs: frozenset[Need] = frozenset({Need.DISTRIBUTION})
    """What its own loss needs from the student."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, which must have the student's vocabulary."""
    config: PreTrainedConfig | None = None
    """The configuration of its model; required if it provides inner states."""
    weight: float | Schedule = 1.0
    """Factor on the mean of the teacher's loss: a number, or a schedule over the run.

    In a step with weight 0 the teacher does not learn: its loss is not computed, and its parameters
    stay as they are.
    """
    figures: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})
    """Further numbers for the log of the last `forward`: a sum and its divisor by name."""
    learning_rate: float | None = None
    """Learning rate of its parameters; None is that of the student."""

    trained_models: tuple[Any, ...] = ()
    """Its models of transformers that have trained parameters."""
    _checkpointed: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever `mode` is: dropout would make the targets noisy."""
        super().train(False)
        # transformers checkpoints only layers in training mode.  Their parts stay in eval mode.
        for layer in self._checkpointed:
            layer.training = True
        return self

    def enable_checkpointing(self) -> None:
        """Compute the activations of its models again in the backward pass, to save memory."""
        for model in self.trained_models:
            unwrap_adapters(model).activation_checkpointing_enable()
            self._checkpointed += tuple(decoder_layers(model))
        self.train()

    @abc.abstractmethod
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens as any teacher does, but with gradients to its parameters."""

    @abc.abstractmethod
    def forward(self, student: StudentView, signal: TeacherSignal, sequences: Sequences) -> LossSum:
        """Return the teacher's own loss, summed over one micro-batch.

        `signal` has gradients, and `student` is detached.
        """

    def watch(self, figures: Mapping[str, float]) -> None:
        """Look at the means of a log line, such as the teacher's own figures; it may warn."""

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return what this batch adds to the divisor of the step: (), an integer tensor."""
        return predicted_tokens(sequences)
