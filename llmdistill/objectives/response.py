"""Objectives on the predicted tokens: match the teacher's distribution, or the tokens themselves.

H = hidden size, N = predicted tokens, n = those of one block, V = vocabulary.  The response
objective is sum_t weight_t * D(target_t, student_t): a divergence, a target builder and a token
weight.  Each is a name of its table or a function with the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.models.chunks import CHUNK_ROWS
from llmdistill.models.taps import Need
from llmdistill.objectives.base import Objective
from llmdistill.objectives.choices import bind, choose, name_of
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import BOUNDS, DIVERGENCES, Divergence, log_probs
from llmdistill.objectives.targets import TARGETS, TargetBuilder
from llmdistill.objectives.weights import (
    TOKEN_WEIGHTS,
    TokenWeight,
    divisor_of,
    predicted_tokens,
)
from llmdistill.sampling import Writer
from llmdistill.schedules import Schedule


class ResponseObjective(Objective):
    """A divergence from the teacher's next-token distribution (or a target built from it).

    `options` belong to the divergence, the target or the token weight: `temperature` to every
    divergence of the table, `beta` to `jsd` and so on.  `divisor` counts what a batch adds to the
    number that the step's sum is divided by: by default what `weights.DIVISORS` has for the token
    weight, or predicted tokens.  `scale_by_t2` multiplies by temperature^2, as Hinton et al. 2015
    (section 2) do next to a cross-entropy.  RecipeError for a name, an option or a value that there
    is not.
    """

    student_needs = frozenset({Need.DISTRIBUTION})
    teacher_needs = frozenset({Need.DISTRIBUTION})

    def __init__(
        self,
        divergence: str | Divergence = "forward_kl",
        *,
        target: str | TargetBuilder = "teacher",
        token_weight: str | TokenWeight = "uniform",
        weight: float | Schedule = 1.0,
        divisor: Callable[[Sequences], Tensor] | None = None,
        scale_by_t2: bool = False,
        chunk_size: int = CHUNK_ROWS,
        **options: float,
    ) -> None:
        super().__init__(weight=weight)
        self.name = name_of(divergence)
        self.scale = options.get("temperature", 1.0) ** 2 if scale_by_t2 else 1.0
        self.divergence, self.target, self.token_weight = bind(
            {
                "divergence": (divergence, DIVERGENCES, BOUNDS),
                "target": (target, TARGETS, {}),
                "token_weight": (token_weight, TOKEN_WEIGHTS, {}),
            },
            options,
        )
        self.count = divisor or divisor_of(choose("token_weight", token_weight, TOKEN_WEIGHTS))
        self.chunk_size = chunk_size

    def divisor(self, sequences: Sequences) -> Tensor:
        return self.count(sequences)

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        assert signal is not None
        assert signal.distribution is not None
        teacher = signal.distribution.serve(self.chunk_size)

        def position_loss(student_nV: Tensor, rows: slice) -> Tensor:
            teacher_nV = teacher[rows].to(student_nV.device)
            return self.divergence(student_nV, self.target(student_nV.detach(), teacher_nV))

        weight_N = self.token_weight(sequences)
        total, _ = chunked_sum(
            student.hidden_NH, student.head, position_loss, weight_N, chunk_size=self.chunk_size
        )
        return LossSum(self.scale * total, predicted_tokens(sequences))


class CrossEntropyObjective(Objective):
    """-log q(token) of the tokens themselves: supervised fine-tuning, SeqKD.

    Tokens that the student wrote weigh nothing: a model learns nothing from its own samples as
    labels.
    """

    name = "cross_entropy"
    student_needs = frozenset({Need.DISTRIBUTION})

    def __init__(self, *, weight: float | Schedule = 1.0, chunk_size: int = CHUNK_ROWS) -> None:
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
        return LossSum(total, predicted_tokens(sequences))
