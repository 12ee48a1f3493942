"""How close a student's distributions are to its teacher's, and to the text, on given sequences.

N = predicted tokens, n = those of one block, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmdistill.batch import Sequences, StudentView, TeacherSignal
from llmdistill.forward import final_hidden
from llmdistill.models.heads import split
from llmdistill.objectives.chunked import HeadLogits, block_rows
from llmdistill.objectives.divergences import kl, log_probs
from llmdistill.objectives.response import CrossEntropyObjective
from llmdistill.protocols import Need, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_SIZE = 256


@dataclass(frozen=True)
class Agreement:
    """Means over predicted tokens.

    `forward_kl`: KL(teacher || student) in nats.  `top1`: share of tokens where both put the same
    one first.  `acceptance`: sum_V min(p, q), the share of the student's drafts that exact
    speculative decoding would accept (Leviathan et al. 2023, corollary 3.6).
    """

    forward_kl: float
    top1: float
    acceptance: float


@dataclass(frozen=True)
class Judged:
    """Sequences with what the teacher says of them: judged once, compared with many students."""

    sequences: Sequences
    signal: TeacherSignal


def judge(teacher: Teacher, batches: Sequence[Sequences]) -> list[Judged]:
    """The batches with the teacher's judgement; its own text brings it along."""
    needs = frozenset({Need.DISTRIBUTION})
    judged = []
    for batch in batches:
        signal = batch.signal or teacher.judge(batch, needs)
        kept = replace(signal, hidden_NH=signal.hidden_NH.cpu())  # they wait there for every model
        judged.append(Judged(replace(batch, signal=None), kept))
    return judged


@torch.no_grad()
def agreement(student: PreTrainedModel, judged: Sequence[Judged], num_tokens: int) -> Agreement:
    """Over the predicted tokens of all batches together.  The student is used in the mode that it
    is in.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in judged:
        sums += _sums(student, batch, num_tokens)
    kl_sum, same, accepted, count = sums.tolist()
    count = max(count, 1)
    return Agreement(kl_sum / count, same / count, accepted / count)


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Sequence[Sequences], num_tokens: int) -> float:
    """exp of the mean negative log-likelihood of the predicted tokens, over all batches together.

    The model is used in the mode that it is in.
    """
    device = next(model.parameters()).device
    likelihood = CrossEntropyObjective()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        sequences = batch.to(device)
        backbone, head = split(model)
        view = StudentView(final_hidden(backbone, sequences), head.narrow(num_tokens))
        sums += torch.tensor([float(part) for part in likelihood(view, None, sequences)])
    total, count = sums.tolist()
    return math.exp(min(total / max(count, 1), 700))  # exp of more is no float


def _sums(student: PreTrainedModel, judged: Judged, num_tokens: int) -> torch.Tensor:
    device = next(student.parameters()).device
    backbone, head = split(student)
    hidden_NH = final_hidden(backbone, judged.sequences.to(device))
    signal = judged.signal
    students = HeadLogits(hidden_NH, head.narrow(num_tokens), CHUNK_SIZE)
    over = signal.head.weight_VH.device
    teachers = HeadLogits(signal.hidden_NH.to(over), signal.head.narrow(num_tokens), CHUNK_SIZE)
    sums = torch.zeros(4, dtype=torch.float64)
    step = min(block_rows(students.chunk_size, num_tokens, device), students.chunk_size)
    for start in range(0, len(hidden_NH), step):
        rows = slice(start, min(start + step, len(hidden_NH)))
        student_nV, teacher_nV = log_probs(students[rows]), log_probs(teachers[rows].to(device))
        same_n = student_nV.argmax(-1) == teacher_nV.argmax(-1)
        accepted_n = 1 - (student_nV.exp() - teacher_nV.exp()).abs().sum(-1) / 2
        parts = (kl(teacher_nV, student_nV), same_n, accepted_n, torch.ones_like(accepted_n))
        sums += torch.stack([part.float().sum() for part in parts]).cpu()
    return sums
