"""The base class of objectives on inner states of both models.

B = rows, T = tokens of a row, D = width of a state, H = hidden size.
N = predicted tokens, or all tokens of the rows that have one.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.models.taps import Need, Tokens
from llmdistill.objectives.base import Objective
from llmdistill.objectives.layer_maps import LAST_LAYERS, Layers, Pairs, layer_pairs
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Compared(NamedTuple):
    """States of the student and of the teacher at the same tokens: (N, D) each, row by row."""

    student_ND: Tensor
    teacher_ND: Tensor


class StateObjective(Objective):
    """Base of objectives that compare inner states of pairs of layers.

    A subclass implements `compare`.  It gets the states in float32 or wider, and computes in that
    dtype, because autocast is off.  The loss is a mean over the pairs, so that a weight means the
    same for any number of layers.

    Args:
        layers: A name in `layer_maps.LAYER_MAPS`, a function of both configurations, or pairs
            (student's layer, teacher's layer).  Layers count from 1.  0 is the embeddings, and -1
            is the last layer, before the final norm.
        tokens: "predicted" for the states that predict the response, or "all" for the states at
            every token of prompt and response.
        weight: Factor on the objective's mean: a number, or a schedule over the run.
        projector_learning_rate: Learning rate of the objective's own parameters.  None is that of
            the student.
    """

    parts: ClassVar[tuple[Need, ...]] = (Need.HIDDEN,)
    """The kinds of states that are compared for each pair of layers."""

    def __init__(
        self,
        *,
        layers: Layers = LAST_LAYERS,
        tokens: Tokens = "predicted",
        weight: float | Schedule = 1.0,
        projector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(weight=weight, projector_learning_rate=projector_learning_rate)
        self.layers, self.tokens = layers, tokens
        self.student_needs = self.teacher_needs = frozenset(self.parts)
        self.needs: list[tuple[Need, Need]] = []

    def pairs(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> Pairs:
        """Return the pairs of layers to compare.  Raises ModelError if they do not fit."""
        return layer_pairs(self.layers, student, teacher)

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers."""
        assert teacher is not None  # A teacher that provides states has a configuration.
        self.needs = [
            (part.after(mine, self.tokens), part.after(other, self.tokens))
            for mine, other in self.pairs(student, teacher)
            for part in self.parts
        ]
        self.student_needs = frozenset(mine for mine, _ in self.needs)
        self.teacher_needs = frozenset(other for _, other in self.needs)

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the sum of the loss over one micro-batch."""
        assert signal is not None
        # Each state is widened once, although several pairs may share it.
        mine = {need: wide(student.states[need]) for need in self.student_needs}
        other = {need: wide(signal.states[need]) for need in self.teacher_needs}
        found = [Compared(mine[a], other[b]) for a, b in self.needs]
        with torch.autocast(sequences.input_ids_BT.device.type, enabled=False):
            total = self.compare(found, sequences)
        if Need.HIDDEN not in self.parts:
            # FSDP2 gathers a layer's weights for the backward pass when a gradient reaches the
            # layer's output, which queries, keys and values inside the layer do not cause.
            total = total + 0.0 * student.hidden_NH.sum()
        return LossSum(total, self.divisor(sequences))

    @abc.abstractmethod
    def compare(self, states: Sequence[Compared], sequences: Sequences) -> Tensor:
        """Return the sum of the loss over one micro-batch: ().

        `states` are in the order of `needs`: pair by pair, and within a pair part by part.
        """


def wide(states: Tensor) -> Tensor:
    """Return the states in float32, or unchanged if their dtype is wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def projected(module: nn.Module, *states: Tensor) -> Tensor:
    """Return the output of a trained module in float32 or wider.

    The module may have bfloat16 weights, under FSDP or in an evaluation with `bf16_full_eval`.
    """
    weight = next(module.parameters(), None)
    if weight is None:
        return module(*states)
    return wide(module(*(one.to(weight.dtype) for one in states)))


def tokens_of_rows(sequences: Sequences, tokens: Tokens) -> list[int]:
    """Return how many states each row with a predicted token has, for `tokens` of a need."""
    counts_B = sequences.num_predicted
    lengths_B = sequences.trained_mask_BT.sum(1) if tokens == "all" else counts_B
    return lengths_B[counts_B > 0].tolist()


def num_tokens_compared(sequences: Sequences, tokens: Tokens) -> Tensor:
    """Return the number of states that a batch compares: ()."""
    masks = {"predicted": sequences.num_predicted, "all": sequences.trained_mask_BT}
    return masks[tokens].sum()
