"""Measures how close a student's distributions are to its teacher's, and to the text itself.

H = hidden size, B = sequences, N = predicted tokens, n = those of one block, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmdistill.batch import Sequences, StudentView
from llmdistill.distributions import Distribution
from llmdistill.evaluation.ranks import summed
from llmdistill.forward import read, teacher_signal
from llmdistill.models.chunks import HeadLogits, block_rows
from llmdistill.models.taps import Need
from llmdistill.models.vocabulary import num_tokens
from llmdistill.objectives.divergences import kl, log_probs
from llmdistill.objectives.response import CrossEntropyObjective
from llmdistill.protocols import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISTRIBUTION = frozenset({Need.DISTRIBUTION})
# What is measured at each predicted token, in this order; `Agreement` says what each one is.
MEASURES = ("kl", "top1_agreement", "draft_acceptance")


@dataclass(frozen=True)
class Agreement:
    """Means over predicted tokens.

    `forward_kl`: KL(teacher || student) in nats.  `top1`: share of positions at which both rank the
    same token first.  `acceptance`: sum_V min(p, q), the share of the student's drafted tokens that
    exact speculative decoding would accept (Leviathan et al. 2023, corollary 3.6).
    """

    forward_kl: float
    top1: float
    acceptance: float


@dataclass(frozen=True)
class Judged:
    """Sequences with the teacher's distributions, which are scored once for many students."""

    sequences: Sequences
    distribution: Distribution

    def select(self, rows: Tensor) -> Judged:
        """Return some rows, given by their places, in this order."""
        places = torch.arange(len(self.distribution)).split(self.sequences.num_predicted.tolist())
        chosen = torch.cat([places[row] for row in rows.tolist()])
        return Judged(self.sequences.select(rows), self.distribution.select(chosen))


def judge(teacher: Teacher, batches: Sequence[Sequences]) -> list[Judged]:
    """Score the batches with the teacher and return them with its distributions, on the CPU.

    Text that the teacher wrote already has its distributions, so the teacher does not run again.
    """
    shared = num_tokens(teacher.tokenizer)
    judged = []
    for batch in batches:
        signal = teacher_signal(teacher, batch, shared, DISTRIBUTION)
        assert signal is not None
        assert signal.distribution is not None
        kept = signal.distribution.to("cpu")  # off the GPU until each model is measured
        judged.append(Judged(replace(batch, signal=None), kept))
    return judged


def agreement(student: PreTrainedModel, judged: Sequence[Judged], num_tokens: int) -> Agreement:
    """Return the means over the predicted tokens of all batches of all ranks together.

    `num_tokens` is the size of the shared vocabulary.  The student keeps its mode (train or eval).
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in judged:
        figures_N3 = per_token(student, batch, num_tokens)
        sums += figures_N3.double().sum(0)
        count += len(figures_N3)
    *totals, number = summed(torch.cat([sums, torch.tensor([count])])).tolist()
    return Agreement(*(total / max(number, 1) for total in totals))  # 0 for no tokens, not NaN


def row_kl(student: PreTrainedModel, judged: Judged, num_tokens: int) -> Tensor:
    """Return each row's mean KL(teacher || student) per predicted token, in nats: (B,).

    A row without predicted tokens gets 0.
    """
    kl_N = per_token(student, judged, num_tokens)[:, 0]
    count_B = judged.sequences.num_predicted.cpu()
    rows_N = torch.arange(len(count_B)).repeat_interleave(count_B)
    return torch.zeros(len(count_B)).index_add_(0, rows_N, kl_N) / count_B.clamp_min(1)


@torch.no_grad()
def per_token(student: PreTrainedModel, judged: Judged, num_tokens: int) -> Tensor:
    """Return KL(teacher || student) in nats, same top token (0 or 1) and acceptance for each
    predicted token: (N, 3), float32, on the CPU.
    """
    device = next(student.parameters()).device
    seen = read(student, judged.sequences.to(device), num_tokens)
    return torch.cat([torch.zeros(0, 3), *closeness(seen, judged.distribution)])


@torch.no_grad()
def closeness(seen: StudentView, distribution: Distribution) -> Iterator[Tensor]:
    """Yield, for a block of predicted tokens at a time, the figures of MEASURES: (n, 3), float32,
    on the CPU.
    """
    for student_nV, teacher_nV in both_log_probs(seen, distribution):
        same_n = student_nV.argmax(-1) == teacher_nV.argmax(-1)
        # sum_V min(p, q) = 1 - |p - q|_1 / 2, for two distributions that each sum to 1.
        accepted_n = 1 - (student_nV.exp() - teacher_nV.exp()).abs().sum(-1) / 2
        columns = (kl(teacher_nV, student_nV), same_n, accepted_n)
        yield torch.stack([column.float() for column in columns], 1).cpu()


@torch.no_grad()
def both_log_probs(
    seen: StudentView, distribution: Distribution
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the log-probabilities of student and teacher, a block of predicted tokens at a time:
    (n, V) each, on the student's device.
    """
    students, teachers = HeadLogits(seen.hidden_NH, seen.head), distribution.serve()
    device = seen.head.weight_VH.device
    step = block_rows(students.chunk_size, seen.head.num_tokens, device)
    for rows in _blocks(len(seen.hidden_NH), step):
        yield log_probs(students[rows]), log_probs(teachers[rows].to(device))


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Sequence[Sequences], num_tokens: int) -> float:
    """Return exp of the mean negative log-likelihood of the predicted tokens of all batches.

    Those of all ranks count.  `num_tokens` is the size of the vocabulary.  The model keeps its mode
    (train or eval).
    """
    device = next(model.parameters()).device
    likelihood = CrossEntropyObjective()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        sequences = batch.to(device)
        view = read(model, sequences, num_tokens)
        sums += torch.tensor([float(part) for part in likelihood(view, None, sequences)])
    total, count = summed(sums).tolist()
    return math.exp(min(total / max(count, 1), 700))  # exp overflows a float above 709


def _blocks(number: int, size: int) -> Iterator[slice]:
    for start in range(0, number, size):
        yield slice(start, min(start + size, number))
