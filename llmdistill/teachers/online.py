"""A teacher that trains along with the student (OKD).

N = predicted tokens, n = those of one block, H = hidden size, V = vocabulary, p = the teacher,
p0 = the teacher without its adapter, q = the student.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmdistill.batch import LossSum, Prompts, Sequences, StudentView, TeacherSignal
from llmdistill.decoding.session import Session
from llmdistill.distributions import Dense
from llmdistill.models.adapters import add_adapter, require_plain
from llmdistill.models.taps import Need
from llmdistill.objectives.choices import choose
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import DIVERGENCES, Divergence, forward_kl
from llmdistill.objectives.labels import cross_entropy, labelled
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.protocols import Progress
from llmdistill.sampling import Draw, Sampling
from llmdistill.teachers.adapter_off import AdapterOffTeacher
from llmdistill.teachers.base import TrainableTeacher
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DRIFT = "teacher_drift"
DRIFT_ROWS = 2  # rows of a micro-batch on which the drift is measured if it is not in the loss
RUNAWAY = 1.0  # drift in nats per token at which a warning is given
FOLDER = "teacher_adapter"

logger = logging.getLogger("llmdistill")


class OnlineTeacher(TrainableTeacher):
    """A local model with a LoRA adapter that is trained together with the student.

    Rao et al. 2024 (OKD, arXiv 2409.12512), algorithm 1.  The teacher's loss of a token is

        alpha * tau^2 * KL(q || p) + (1 - alpha) * CE(label, p) + drift_weight * KL(p0 || p)

    with both distributions at temperature tau in the first term, and with q detached.  The paper
    does not print alpha, tau and the scale of the adapter (1 here).  Tokens that the student wrote
    are no labels.  The log shows the mean of KL(p0 || p) as `teacher_drift`.

    Args:
        model: A causal LM of transformers, which gets the adapter.  Its weights are frozen.
        tokenizer: The tokenizer of the model, with the student's vocabulary.
        alpha: Share of the divergence, 0 to 1.
        tau: Temperature of the divergence.
        teacher_divergence: A name in `divergences.DIVERGENCES`, or a function, which compares the
            teacher with the student as its target.
        teacher_every: Steps after which the teacher learns again.
        drift_weight: Factor of KL(p0 || p).
        rank: Rank of the adapter.
        targets: Names of the linear layers to adapt, or "all-linear".
        teacher_learning_rate: Learning rate of the adapter.  None is that of the student.
        seed: Seed of the adapter's random factor.

    Raises:
        ModelError: The weights are quantised or not in one place, or no layer has one of the names.
    """

    provides = LocalTeacher.provides
    reads_changes = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        alpha: float = 0.5,
        tau: float = 1.0,
        teacher_divergence: str | Divergence = "forward_kl",
        teacher_every: int = 1,
        drift_weight: float = 0.0,
        rank: int = 32,
        targets: str | Sequence[str] = ("q_proj", "v_proj"),
        teacher_learning_rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_plain(model)
        local = LocalTeacher(model, tokenizer)
        self.model = add_adapter(
            model, rank=rank, alpha=rank, targets=targets, dropout=0.0, seed=seed,
            key="teacher.targets",
        )  # fmt: skip
        local.model = self.model.eval()
        self.trained_models = (self.model,)
        self._local = local
        self.plain = AdapterOffTeacher(self.model, tokenizer)
        """The teacher without its adapter, which does not change."""
        self.tokenizer, self.config = tokenizer, local.config
        self.alpha, self.tau, self.drift_weight = alpha, tau, drift_weight
        self.divergence = choose("teacher_divergence", teacher_divergence, DIVERGENCES)
        self.learning_rate = teacher_learning_rate
        if teacher_every > 1:
            self.weight = Every(teacher_every)
        self._has_warned = False

    @property
    def ends(self) -> frozenset[int]:
        """The token ids that end a response of this teacher."""
        return self._local.ends

    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens with one forward pass, with gradients to the adapter."""
        return self._local.score(sequences, needs)

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """Write one response to each prompt, with the adapter as it is now."""
        return self._local.write(prompts, sampling, max_new_tokens=max_new_tokens, draw=draw)

    def session(self, prompts: Prompts) -> AbstractContextManager[Session]:
        """Open a session of the teacher on these prompts, for interleaved rollouts."""
        return self._local.session(prompts)

    def forward(self, student: StudentView, signal: TeacherSignal, sequences: Sequences) -> LossSum:
        """Return the teacher's loss, summed over one micro-batch, and its drift."""
        own, targets_N = signal.distribution, sequences.targets_N
        assert isinstance(own, Dense)
        student_logits = Dense(student.hidden_NH, student.head).serve()
        labelled_N = labelled(sequences)
        untouched = self._untouched(sequences, own.head.num_tokens) if self.drift_weight else None
        base = None if untouched is None else untouched.serve()

        def position_loss(teacher_nV: Tensor, rows: slice) -> Tensor:
            loss_n = teacher_nV.new_zeros(len(teacher_nV))
            if self.alpha > 0:
                student_nV = student_logits[rows].to(teacher_nV.device)
                divergence_n = self.divergence(teacher_nV, student_nV, temperature=self.tau)
                loss_n = loss_n + self.alpha * self.tau**2 * divergence_n
            if self.alpha < 1:
                label_n = cross_entropy(teacher_nV, targets_N[rows])
                loss_n = loss_n + (1 - self.alpha) * labelled_N[rows] * label_n
            if base is not None:
                loss_n = loss_n + self.drift_weight * forward_kl(teacher_nV, base[rows])
            return loss_n

        ones_N = torch.ones_like(labelled_N)
        total, _ = chunked_sum(own.hidden_NH, own.head, position_loss, ones_N)
        self.figures = {DRIFT: self._drift(own.detach(), untouched, sequences)}
        return LossSum(total, predicted_tokens(sequences))

    @torch.no_grad()
    def _untouched(self, sequences: Sequences, num_tokens: int) -> Dense:
        """Return the distribution of the teacher without its adapter."""
        found = self.plain.judge(sequences, frozenset({Need.DISTRIBUTION})).distribution
        assert isinstance(found, Dense)
        return found.narrow(num_tokens)

    @torch.no_grad()
    def _drift(
        self, own: Dense, untouched: Dense | None, sequences: Sequences
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of KL(p0 || p) over some tokens, and their number: (), ()."""
        if untouched is None:
            rows = (sequences.num_predicted > 0).nonzero()[:DRIFT_ROWS, 0]
            if not len(rows):  # filler rows alone
                zero = torch.zeros((), device=own.hidden_NH.device)
                return zero, zero
            some = sequences.select(rows)
            row_N = torch.arange(len(sequences), device=rows.device)
            row_N = row_N.repeat_interleave(sequences.num_predicted)
            own = own.select(torch.isin(row_N, rows))
            untouched = self._untouched(some, own.head.num_tokens)
        base = untouched.serve()
        ones_N = torch.ones(len(own), device=own.hidden_NH.device)
        total, _ = chunked_sum(
            own.hidden_NH, own.head, lambda own_nV, rows: forward_kl(own_nV, base[rows]), ones_N
        )
        return total, torch.tensor(len(own), device=total.device)

    def watch(self, figures: Mapping[str, float]) -> None:
        """Warn once if the teacher drifts away from what it was."""
        drift = figures.get(DRIFT, 0.0)
        if drift > RUNAWAY and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the teacher is %.2f nats per token away from what it was before training "
                "(teacher_drift). Lower alpha or teacher_learning_rate, or raise drift_weight or "
                "teacher_every.",
                drift,
            )

    def export(self, folder: Path) -> None:
        """Write the adapter into `folder`/teacher_adapter, in PEFT's format."""
        self.model.save_pretrained(folder / FOLDER)


@dataclass(frozen=True)
class Every:
    """A weight that is 1 in every n-th step, from the first, and 0 in the others."""

    steps: int

    def __call__(self, progress: Progress) -> float:
        return float(progress.step % self.steps == 0)
