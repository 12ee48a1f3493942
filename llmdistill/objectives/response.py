"""Objectives on the predicted tokens: match the teacher's distribution, or the tokens themselves.

N = predicted tokens, n = those of one block, V = vocabulary. The response objective is sum_t
weight_t * D(target_t, student_t): a divergence, a target builder and a token weight, each chosen by
name.
"""

from __future__ import annotations

import functools
import inspect
from typing import TypeVar

import torch
from torch import Tensor

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.errors import RecipeError
from llmdistill.objectives.base import Objective
from llmdistill.objectives.chunked import HeadLogits, chunked_sum
from llmdistill.objectives.divergences import DIVERGENCES, Divergence, log_probs
from llmdistill.objectives.targets import TARGETS
from llmdistill.objectives.weights import TOKEN_WEIGHTS
from llmdistill.protocols import Need
from llmdistill.recipe.facts import wrong_option
from llmdistill.sampling import Writer

Value = TypeVar("Value")


class ResponseObjective(Objective):
    """A divergence from the teacher's next-token distribution (or a target built from it).

    `options` are the divergence's own: `temperature` for all of them, `beta` for `jsd` and so on.
    `scale_by_t2` multiplies by temperature^2, as Hinton et al. 2015 (section 2) do where a
    cross-entropy stands beside it.
    """

    needs = frozenset({Need.DISTRIBUTION})

    def __init__(
        self,
        divergence: str = "forward_kl",
        *,
        target: str = "teacher",
        token_weight: str = "uniform",
        weight: float = 1.0,
        scale_by_t2: bool = False,
        chunk_size: int = 256,
        **options: float,
    ) -> None:
        super().__init__(weight=weight)
        self.name = divergence
        self.scale = options.get("temperature", 1.0) ** 2 if scale_by_t2 else 1.0
        self.divergence = bind_divergence(divergence, options)
        self.target = choose("target", target, TARGETS)
        self.token_weight = choose("token_weight", token_weight, TOKEN_WEIGHTS)
        self.chunk_size = chunk_size

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        assert signal is not None
        teacher = HeadLogits(signal.hidden_NH, signal.head, self.chunk_size)

        def position_loss(student_nV: Tensor, rows: slice) -> Tensor:
            teacher_nV = teacher[rows].to(student_nV.device)
            return self.divergence(student_nV, self.target(student_nV.detach(), teacher_nV))

        weight_N = self.token_weight(sequences)
        total, _ = chunked_sum(
            student.hidden_NH, student.head, position_loss, weight_N, chunk_size=self.chunk_size
        )
        return LossSum(self.scale * total, sequences.num_predicted.sum())


class CrossEntropyObjective(Objective):
    """-log q(token) of the tokens themselves: supervised fine-tuning, SeqKD.

    Tokens that the student wrote weigh nothing: a model learns nothing from its own samples as
    labels.
    """

    name = "cross_entropy"

    def __init__(self, *, weight: float = 1.0, chunk_size: int = 256) -> None:
        super().__init__(weight=weight)
        self.chunk_size = chunk_size

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        targets_N = sequences.targets_N

        def position_loss(student_nV: Tensor, rows: slice) -> Tensor:
            return -log_probs(student_nV).gather(-1, targets_N[rows, None])[:, 0]

        weight_N = (sequences.target_writers_N != Writer.STUDENT).to(torch.float32)
        total, _ = chunked_sum(
            student.hidden_NH, student.head, position_loss, weight_N, chunk_size=self.chunk_size
        )
        return LossSum(total, sequences.num_predicted.sum())


def bind_divergence(name: str, options: dict[str, float]) -> Divergence:
    """The named divergence with its options; RecipeError for a name, an option or a value that
    there is not.
    """
    function = choose("divergence", name, DIVERGENCES)
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if wrong := wrong_option(name, options, known):
        raise RecipeError(wrong)
    return functools.partial(function, **options)


def choose(what: str, name: str, table: dict[str, Value]) -> Value:
    """The entry of a table; RecipeError that lists the names where there is none."""
    if name not in table:
        raise RecipeError(f"unknown {what} '{name}'; choose one of {', '.join(table)}")
    return table[name]
