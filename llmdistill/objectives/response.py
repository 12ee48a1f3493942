"""Objectives on the predicted tokens: match the teacher's distribution, or the tokens themselves.

H = hidden size, N = predicted tokens, n = those of one block, V = vocabulary.  The response
objective is sum_t weight_t * D(target_t, student_t), with a divergence D, a target and a token
weight.  Each of the three is a name in its table or a function with the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.distributions import targets
from llmdistill.models.chunks import CHUNK_ROWS
from llmdistill.models.taps import Need
from llmdistill.objectives.base import Objective
from llmdistill.objectives.choices import bind, choose, name_of
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import BOUNDS, DIVERGENCES, Divergence
from llmdistill.objectives.labels import cross_entropy, labelled
from llmdistill.objectives.targets import TARGETS, TargetBuilder
from llmdistill.objectives.weights import (
    TOKEN_WEIGHTS,
    TokenWeight,
    divisor_of,
    predicted_tokens,
)
from llmdistill.schedules import Schedule


class ResponseObjective(Objective):
    """A divergence between the next-token distributions of teacher and student.

    The sum over predicted tokens of weight * divergence(student, target).  Logits are computed in
    chunks, so long batches with a large vocabulary need little memory.

    Args:
        divergence: A name in `divergences.DIVERGENCES`, or a function of student and teacher
            logits, both (N, V), that returns (N,) in nats.
        target: A name in `targets.TARGETS`, or a function of student and teacher logits that
            returns the logits that the student is compared with.
        token_weight: A name in `weights.TOKEN_WEIGHTS`, or a function of `Sequences` that returns
            (N,) factors.
        weight: Factor on the objective's mean: a number, or a schedule over the run.
        divisor: A function of `Sequences` that returns what a batch adds to the divisor of the
            step: (), an integer.  By default it is the count of the token weight in
            `weights.DIVISORS`, or else the number of predicted tokens.
        scale_by_t2: Multiply by temperature^2.  The gradient then keeps its size next to a
            cross-entropy when the temperature changes (Hinton et al. 2015, section 2).
        chunk_size: The most positions whose logits are in memory at a time.
        options: Options of the divergence, the target or the token weight: `temperature` of every
            divergence in the table, `beta` of `jsd` and so on.

    Raises:
        RecipeError: If a name or an option is unknown, or the value of an option is out of bounds.
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
        """Return what this batch adds to the divisor of the step: (), an integer tensor."""
        return self.count(sequences)

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the sum of the weighted divergences over one micro-batch, in nats."""
        assert signal is not None
        assert signal.distribution is not None
        compared = [
            (factor_N, one.serve(self.chunk_size)) for factor_N, one in targets(signal.distribution)
        ]

        def position_loss(student_nV: Tensor, rows: slice) -> Tensor:
            losses = []
            for factor_N, teacher in compared:
                teacher_nV = teacher[rows].to(student_nV.device)
                loss_n = self.divergence(student_nV, self.target(student_nV.detach(), teacher_nV))
                losses.append(loss_n if factor_N is None else factor_N[rows].to(loss_n) * loss_n)
            first, *others = losses
            return sum(others, start=first)

        weight_N = self.token_weight(sequences)
        total, _ = chunked_sum(
            student.hidden_NH, student.head, position_loss, weight_N, chunk_size=self.chunk_size
        )
        return LossSum(self.scale * total, predicted_tokens(sequences))


class CrossEntropyObjective(Objective):
    """The negative log-likelihood of the predicted tokens: supervised fine-tuning, or SeqKD.

    The loss of a token is -log q(token), in nats, with the student's probability q.  Tokens that
    the student wrote have weight 0, because a model learns nothing from its own samples as labels.
    They still count in the divisor.

    Args:
        weight: Factor on the objective's mean: a number, or a schedule over the run.
        chunk_size: The most positions whose logits are in memory at a time.
    """

    name = "cross_entropy"
    student_needs = frozenset({Need.DISTRIBUTION})

    def __init__(self, *, weight: float | Schedule = 1.0, chunk_size: int = CHUNK_ROWS) -> None:
        super().__init__(weight=weight)
        self.chunk_size = chunk_size

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the sum of -log q(token) over one micro-batch, in nats."""
        targets_N = sequences.targets_N

        def position_loss(student_nV: Tensor, rows: slice) -> Tensor:
            return cross_entropy(student_nV, targets_N[rows])

        total, _ = chunked_sum(
            student.hidden_NH,
            student.head,
            position_loss,
            labelled(sequences),
            chunk_size=self.chunk_size,
        )
        return LossSum(total, predicted_tokens(sequences))
