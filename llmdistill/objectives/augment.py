"""Objectives on changed inputs: another objective, in further forward passes of both models.

B = rows, N = predicted tokens, n = those of one block, H = hidden size, V = vocabulary.  The inputs
are changed in the embeddings of both models (`changes.py`).  The term adds to the objectives on the
unchanged inputs, which are listed apart.
"""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.distributions import Dense
from llmdistill.errors import RecipeError
from llmdistill.objectives.base import Need, Objective, Passes
from llmdistill.objectives.changes import (
    Perturbation,
    change_keys,
    dropped,
    mixed,
    partners_of,
    random_start,
    shares,
)
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.contrastive import QueuedObjective
from llmdistill.objectives.response import ResponseObjective
from llmdistill.objectives.samples import sum_over_ranks
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Sees = Literal["clean", "changed"]


class AugmentedObjective(Objective):
    """Base of objectives that compare both models on changed inputs.

    A subclass implements `changed`, which makes further forward passes.  A held-out loss is that of
    the wrapped objective on the unchanged inputs, so that it can be compared from step to step.

    Args:
        of: The objective that compares the models, with a weight of 1.  None is a
            `ResponseObjective`.
        weight: Factor on the objective's mean: a number, or a schedule over the run.

    Raises:
        RecipeError: The wrapped objective has another weight, needs nothing from the teacher,
            changes its inputs itself or keeps a queue.
    """

    teacher_reads_changes: bool = True
    """Whether the teacher must read the changed inputs."""
    needs_teacher_gradients: bool = False
    """Whether the teacher's signal must be differentiated by what it reads."""
    differentiates_inputs: bool = False
    """Whether the student's loss is differentiated by what it reads, within the forward pass."""

    def __init__(self, of: Objective | None = None, *, weight: float | Schedule = 1.0) -> None:
        super().__init__(weight=weight)
        self.inner: Objective = ResponseObjective() if of is None else of
        if self.inner.weight != 1.0:
            raise RecipeError(
                f"'{self.name}' wraps an objective with weight {self.inner.weight}, which would "
                "have no effect. Set the weight of the outer one."
            )
        if not self.inner.teacher_needs:
            raise RecipeError(
                f"'{self.name}' compares both models on changed inputs, but '{self.inner.name}' "
                "compares nothing with the teacher. Wrap another objective."
            )
        if isinstance(self.inner, AugmentedObjective | QueuedObjective):
            raise RecipeError(
                f"'{self.name}' cannot wrap '{self.inner.name}', which changes inputs itself or "
                "keeps a queue. Wrap another objective."
            )
        self.projector_learning_rate = self.inner.projector_learning_rate
        self.reaches_the_head = self.inner.reaches_the_head
        self.compares_samples = self.compares_samples or self.inner.compares_samples
        self.least_rows = max(self.least_rows, self.inner.least_rows)
        self.advised_rows = self.inner.advised_rows

    @property
    def student_needs(self) -> frozenset[Need]:  # type: ignore[override]
        """What the wrapped objective needs of the student."""
        return self.inner.student_needs

    @property
    def teacher_needs(self) -> frozenset[Need]:  # type: ignore[override]
        """What the wrapped objective needs of the teacher."""
        return self.inner.teacher_needs

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Prepare the wrapped objective."""
        self.inner.prepare(student, teacher)

    def start_from(self, student: PreTrainedModel) -> None:
        """Let the wrapped objective copy parts of the student."""
        self.inner.start_from(student)

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return what this batch adds to the divisor of the wrapped objective: (), an integer."""
        return self.inner.divisor(sequences)

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the loss of the wrapped objective on the unchanged inputs."""
        return self.inner(student, signal, sequences)

    @abc.abstractmethod
    def changed(
        self, signal: TeacherSignal | None, sequences: Sequences, passes: Passes
    ) -> LossSum:
        """Return the loss on the changed inputs, summed over one micro-batch of training.

        Args:
            signal: The teacher's output on the unchanged inputs.
            sequences: The unchanged inputs.
            passes: Further forward passes of both models.
        """

    def compared(
        self, seen: Sequences, passes: Passes, signal: TeacherSignal | None = None
    ) -> LossSum:
        """Return the wrapped loss on what the student has `seen`.

        The target is `signal`; None lets the teacher read the same.
        """
        target = passes.teacher(seen, self.teacher_needs) if signal is None else signal
        return self.inner(passes.student(seen, self.student_needs), target, seen)


class MixObjective(AugmentedObjective):
    """MixKD: both models read the same mixture of two rows, each in its own embeddings.

    Each row is mixed with another one of similar length, with a share max(u, 1 - u),
    u ~ Beta(alpha, alpha).  The partner is one of the rows of the micro-batch on all ranks.  The
    loss is the mean over the tokens that one of the rows predicts, times the number of tokens of
    the unchanged rows.  So the end of a longer partner counts as much as other tokens, although its
    embeddings have a small share.  Liang et al. 2021 (MixKD, arXiv 2011.00593), the mixup of
    teacher and student.

    Args:
        of: As in `AugmentedObjective`.
        alpha: Parameter of the Beta distribution.  A smaller one mixes in less of the partner.
        weight: Factor on the objective's mean: a number, or a schedule over the run.
    """

    name = "mixkd"
    compares_samples = True
    least_rows = 2

    def __init__(
        self, of: Objective | None = None, *, alpha: float = 0.4, weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(of, weight=weight)
        self.alpha = alpha

    def changed(
        self, signal: TeacherSignal | None, sequences: Sequences, passes: Passes
    ) -> LossSum:
        """Return the loss on the mixed rows."""
        share_B = self.shares(change_keys(passes.progress, sequences.row_ids_B))
        mixture = mixed(sequences, partners_of(sequences, passes.progress), share_B)
        total, _ = self.compared(mixture, passes)
        plain, more = (sum_over_ranks(self.inner.divisor(one)) for one in (sequences, mixture))
        return LossSum(total * plain / more.clamp_min(1), predicted_tokens(sequences))

    def shares(self, keys_B: Tensor) -> Tensor:
        """Return the share of each row in its mixture: (B,)."""
        return shares(keys_B, self.alpha)


class TokenDropoutObjective(AugmentedObjective):
    """Token dropout: the embeddings of random tokens are 0, but the tokens are still predicted.

    It is the augmentation of R2KD for language models (Kim et al. 2023 augment images).

    Args:
        of: As in `AugmentedObjective`.
        rate: Share of the tokens that are dropped, on average.  The first of each row is kept.
        teacher_sees: "changed" lets the teacher read the same, in one more forward pass.  "clean"
            takes its distribution on the unchanged inputs.
        weight: Factor on the objective's mean: a number, or a schedule over the run.
    """

    name = "token_dropout"

    def __init__(
        self,
        of: Objective | None = None,
        *,
        rate: float = 0.1,
        teacher_sees: Sees = "changed",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(of, weight=weight)
        self.rate, self.teacher_sees = rate, teacher_sees
        self.teacher_reads_changes = teacher_sees == "changed"

    def changed(
        self, signal: TeacherSignal | None, sequences: Sequences, passes: Passes
    ) -> LossSum:
        """Return the loss on the rows without the dropped tokens."""
        seen = dropped(sequences, self.rate, passes.progress)
        return self.compared(seen, passes, None if self.teacher_reads_changes else signal)


HALF = 0.5  # the step of several, in units of the longest perturbation


class AdversarialObjective(AugmentedObjective):
    """Adversarial inputs: the student's embeddings are moved to where the loss is large.

    Each token's perturbation is at most `epsilon` times as long as its embedding.  It has no
    gradient.  Miyato et al. 2017 (FGM), Madry et al. 2018 (PGD); Goldblum et al. 2020 (ARD) compare
    with a teacher on the unchanged input.

    Args:
        of: As in `AugmentedObjective`.
        epsilon: The longest perturbation of a token, as a share of the length of its embedding.
        steps: Steps along the gradient, each of which takes a forward and a backward pass.  One is
            of full length (FGM); several are of half the length, from a random start (PGD).
        teacher_sees: "clean" takes the teacher's output on the unchanged inputs.  "changed" also
            moves the teacher's embeddings to where the divergence is large, which takes twice the
            passes.  It needs a `ResponseObjective`.
        weight: Factor on the objective's mean: a number, or a schedule over the run.

    Raises:
        RecipeError: `teacher_sees` does not fit the wrapped objective.
    """

    name = "adversarial"
    differentiates_inputs = True

    def __init__(
        self,
        of: Objective | None = None,
        *,
        epsilon: float = 0.05,
        steps: int = 1,
        teacher_sees: Sees = "clean",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(of, weight=weight)
        self.epsilon, self.steps, self.teacher_sees = epsilon, steps, teacher_sees
        self.teacher_reads_changes = self.needs_teacher_gradients = teacher_sees == "changed"
        if self.needs_teacher_gradients and not isinstance(self.inner, ResponseObjective):
            raise RecipeError(
                "a teacher that sees changed inputs is moved along the gradient of a divergence, "
                f"but '{self.inner.name}' is none. Wrap a response objective, or set "
                "teacher_sees='clean'."
            )

    def changed(
        self, signal: TeacherSignal | None, sequences: Sequences, passes: Passes
    ) -> LossSum:
        """Return the loss on the perturbed inputs."""
        assert signal is not None  # the wrapped objective needs it
        start, moves = None, [1.0]
        if self.steps > 1:
            start, moves = random_start(sequences, passes.progress), [HALF] * self.steps
        own = Perturbation(self.epsilon, start)
        seen = replace(sequences, embedding_change=own, signal=None)
        its = Perturbation(self.epsilon, start)
        judged = replace(sequences, embedding_change=its, signal=None)
        for move in moves:
            view = passes.student(seen, self.student_needs)
            fixed = StudentView(view.hidden_NH, view.head.detach(), view.states)
            if self.needs_teacher_gradients:
                signal = passes.teacher_with_gradients(judged, self.teacher_needs)
                its.climb(self._divergence(view, signal, seen), move)
            own.climb(self.inner(fixed, signal.detach(), seen).total, move)
        own.stay()
        if self.needs_teacher_gradients:
            its.stay()
            signal = passes.teacher(judged, self.teacher_needs)
        return self.compared(seen, passes, signal)

    def _divergence(
        self, student: StudentView, signal: TeacherSignal, sequences: Sequences
    ) -> Tensor:
        """Return the divergence as a function of the teacher, summed over one micro-batch: ()."""
        own, inner = signal.distribution, self.inner
        assert isinstance(own, Dense)
        assert isinstance(inner, ResponseObjective)
        other = Dense(student.hidden_NH, student.head).detach().serve(inner.chunk_size)

        def position_loss(teacher_nV: Tensor, rows: slice) -> Tensor:
            student_nV = other[rows].to(teacher_nV)
            return inner.divergence(student_nV, inner.target(student_nV, teacher_nV))

        weight_N = inner.token_weight(sequences).to(own.hidden_NH.device)
        total, _ = chunked_sum(
            own.hidden_NH, own.head.detach(), position_loss, weight_N, chunk_size=inner.chunk_size
        )
        return total
