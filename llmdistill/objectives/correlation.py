"""Objectives on the correlation of next-token distributions: DIST and R2KD.

N = predicted tokens, n = those of one block, V = vocabulary, H = hidden size, k = likeliest tokens.
A correlation is taken along the vocabulary for each token, and along the tokens of the batch for
each entry of the vocabulary.  N x V numbers are never in memory: the sums along the batch are
computed first, and then each block of tokens gets their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.distributions import ServedLogits
from llmdistill.models.chunks import CHUNK_ROWS, HeadLogits, block_rows, rows_of_chunk
from llmdistill.models.taps import Need
from llmdistill.objectives.base import Objective
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.samples import sum_over_ranks
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.schedules import Schedule

EPSILON = 1e-12  # a vocabulary entry that no model finds likelier than 1e-6 counts as equal
FLAT = 1e-8  # and so does one whose probabilities vary by less than a ten-thousandth
BLOCK = 4_000_000  # most numbers of a block whose products are in float64


@dataclass
class Sums:
    """Sums over tokens of the probabilities p of the teacher and q of the student: (V,) each."""

    p: Tensor
    q: Tensor
    pp: Tensor
    qq: Tensor
    pq: Tensor

    @classmethod
    def of(cls, student_nV: Tensor, teacher_nV: Tensor) -> Sums:
        """Return the sums over the probabilities of some tokens."""
        # Correlations are small differences of these sums.  Apple's GPUs have no float64.
        wide = torch.float32 if student_nV.device.type == "mps" else torch.float64
        p_nV, q_nV = teacher_nV.to(wide), student_nV.to(wide)
        products = (p_nV, q_nV, p_nV * p_nV, q_nV * q_nV, p_nV * q_nV)
        return cls(*(product.sum(0) for product in products))

    def parts(self) -> list[Tensor]:
        """Return the five sums."""
        return [self.p, self.q, self.pp, self.qq, self.pq]

    def add(self, other: Sums) -> None:
        """Add the sums of other tokens in place."""
        for mine, more in zip(self.parts(), other.parts(), strict=True):
            mine += more

    def over_ranks(self) -> Sums:
        """Return the sums over the tokens of all ranks."""
        return Sums(*sum_over_ranks(torch.stack(self.parts())))


@dataclass
class AlongTokens:
    """1 - the correlation along the tokens, and its derivative by the student's probabilities.

    The derivative by q is by_q (q - centre_q) + by_p (p - centre_p): (V,) each.  Everything is
    without gradients.
    """

    distance: Tensor
    centre_p: Tensor
    centre_q: Tensor
    by_p: Tensor
    by_q: Tensor

    @classmethod
    def of(cls, sums: Sums, number: Tensor, *, centred: bool) -> AlongTokens:
        """Return Pearson's correlation (`centred`) or the cosine, from sums of `number` tokens.

        It is a mean over the vocabulary, in which each entry counts with the teacher's mean
        probability of it.  The papers count all classes the same, but most tokens of a vocabulary
        are never likely.
        """
        centre_p, centre_q = (one / number * centred for one in (sums.p, sums.q))
        floor_p, floor_q = (FLAT * one + EPSILON for one in (sums.pp, sums.qq))
        pp = (sums.pp - number * centre_p**2).clamp_min(0) + floor_p
        qq = (sums.qq - number * centre_q**2).clamp_min(0) + floor_q
        pq = sums.pq - number * centre_p * centre_q + (floor_p * floor_q).sqrt()
        correlation, mass = pq / (pp * qq).sqrt(), sums.p / number
        if number < 2:  # one token has no deviation from its mean
            correlation, mass = torch.ones_like(pq), mass * 0
        by_p, by_q = -mass / (pp * qq).sqrt(), mass * correlation / qq
        distance = (mass * (1 - correlation)).sum()
        return cls(distance, *(one.float() for one in (centre_p, centre_q, by_p, by_q)))

    def slope(self, student_nV: Tensor, teacher_nV: Tensor) -> Tensor:
        """Return zeros that have the derivative as their gradient: (n,)."""
        p_nV, q_nV = teacher_nV - self.centre_p, student_nV - self.centre_q
        value_n = (q_nV * (self.by_q / 2 * q_nV + self.by_p * p_nV)).sum(-1)
        return value_n - value_n.detach()


def cosine(student_nV: Tensor, teacher_nV: Tensor) -> Tensor:
    """Return the cosine of both distributions of each token: (n,).  Kim et al. 2023 (R2KD)."""
    return nn.functional.cosine_similarity(student_nV, teacher_nV, dim=-1)


def pearson(student_nV: Tensor, teacher_nV: Tensor) -> Tensor:
    """Return the Pearson correlation of both distributions of each token: (n,).

    Huang et al. 2022 (DIST).
    """
    student_nV = student_nV - student_nV.mean(-1, keepdim=True)
    return cosine(student_nV, teacher_nV - teacher_nV.mean(-1, keepdim=True))


def rank_distance(student_nV: Tensor, teacher_nV: Tensor, k: int) -> Tensor:
    """Return 1 - Spearman's correlation of the logits of the teacher's k likeliest tokens: (n,).

    The rank of a token is sum_j sigmoid(x_j - x_i), which has a gradient, unlike the sorted ranks
    of Kim et al. 2023 (R2KD).
    """
    top = teacher_nV.topk(min(k, teacher_nV.shape[1]), dim=1)
    student_nk = student_nV.gather(1, top.indices)
    return 1 - pearson(_soft_ranks(student_nk), _soft_ranks(top.values))


def _soft_ranks(logits_nk: Tensor) -> Tensor:
    return (logits_nk[:, None, :] - logits_nk[:, :, None]).sigmoid().sum(-1)


class DistObjective(Objective):
    """DIST: the Pearson correlation of probabilities, within each token and along the batch.

    temperature^2 (inter (1 - r of each token) + intra (1 - r of each vocabulary entry)).  Huang et
    al. 2022 (DIST).

    Args:
        inter: Factor on the correlation within each token's distribution.
        intra: Factor on the correlation along the tokens of the batch.
        temperature: Divides the logits of both models before the softmax.
        weight: Factor on the objective's mean over tokens: a number, or a schedule over the run.
        chunk_size: The most positions whose logits are in memory at a time.
    """

    name = "dist"
    student_needs = frozenset({Need.DISTRIBUTION})
    teacher_needs = frozenset({Need.DISTRIBUTION})
    compares_samples = True
    centred: ClassVar[bool] = True  # Pearson's correlation; if False, the cosine

    def __init__(
        self,
        *,
        inter: float = 1.0,
        intra: float = 1.0,
        temperature: float = 1.0,
        weight: float | Schedule = 1.0,
        chunk_size: int = CHUNK_ROWS,
    ) -> None:
        super().__init__(weight=weight)
        self.inter, self.intra, self.temperature = inter, intra, temperature
        self.chunk_size = chunk_size

    def extra(self, student_nV: Tensor, teacher_nV: Tensor) -> Tensor | float:
        """Return a further loss of each token from the logits of both models: (n,)."""
        return 0.0

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the sum of both distances over one micro-batch."""
        assert signal is not None
        assert signal.distribution is not None
        teacher = signal.distribution.serve(self.chunk_size)
        within = pearson if self.centred else cosine
        inter, intra = (self.temperature**2 * factor for factor in (self.inter, self.intra))
        count = predicted_tokens(sequences)
        number = sum_over_ranks(count).clamp_min(1)
        sums = self._sums(student, teacher).over_ranks()
        along = AlongTokens.of(sums, number, centred=self.centred)

        def position_loss(student_nV: Tensor, rows: slice) -> Tensor:
            teacher_nV = teacher[rows].to(student_nV.device, student_nV.dtype)
            p_nV, q_nV = (self._probabilities(one) for one in (teacher_nV, student_nV))
            across_n = inter * (1 - within(q_nV, p_nV)) + intra * number * along.slope(q_nV, p_nV)
            return across_n + self.extra(student_nV, teacher_nV)

        ones_N = torch.ones(len(student.hidden_NH), device=student.hidden_NH.device)
        total, _ = chunked_sum(
            student.hidden_NH, student.head, position_loss, ones_N, chunk_size=self.chunk_size
        )
        return LossSum(total + intra * count * along.distance.to(total.dtype), count)

    def _probabilities(self, logits_nV: Tensor) -> Tensor:
        return (logits_nV / self.temperature).softmax(-1)

    @torch.no_grad()
    def _sums(self, student: StudentView, teacher: ServedLogits) -> Sums:
        """Return the sums over all tokens of this rank, a block at a time."""
        hidden_NH, head = student.hidden_NH, student.head.detach()
        if torch.is_autocast_enabled(hidden_NH.device.type):  # as `chunked_sum` multiplies
            dtype = torch.get_autocast_dtype(hidden_NH.device.type)
            head = replace(head, weight_VH=head.weight_VH.to(dtype))
        own = HeadLogits(hidden_NH, head, self.chunk_size)
        wide = torch.promote_types(head.weight_VH.dtype, torch.float32)
        longest = min(rows_of_chunk(self.chunk_size, head), max(1, BLOCK // head.num_tokens))
        step = block_rows(longest, head.num_tokens, hidden_NH.device)
        empty_nV = hidden_NH.new_zeros(0, head.num_tokens, dtype=wide)
        total = Sums.of(empty_nV, empty_nV)
        for start in range(0, len(hidden_NH), step):
            rows = slice(start, min(start + step, len(hidden_NH)))
            p_nV, q_nV = (
                self._probabilities(one[rows].to(hidden_NH.device, wide)) for one in (teacher, own)
            )
            total.add(Sums.of(q_nV, p_nV))
        return total


class CorrelationObjective(DistObjective):
    """R2KD's correlation distance: the cosine of probabilities, and the order of likely tokens.

    value T^2 (1 - cos of each token + 1 - cos along the batch) + rank (1 - Spearman).  Kim et al.
    2023 (R2KD).  A teacher of kind `pruned` gives the targets of the paper.

    Args:
        value: Factor on the two cosine distances.  The default is that of the paper.
        rank: Factor on the rank distance.  The default is that of the paper.
        ranked_tokens: Number of the teacher's likeliest tokens whose order is compared.
        temperature: Divides the logits of the cosine distances.  The default is that of the paper.
        weight: Factor on the objective's mean over tokens: a number, or a schedule over the run.
        chunk_size: The most positions whose logits are in memory at a time.
    """

    name = "correlation"
    centred = False

    def __init__(
        self,
        *,
        value: float = 2.0,
        rank: float = 2.0,
        ranked_tokens: int = 64,
        temperature: float = 4.0,
        weight: float | Schedule = 1.0,
        chunk_size: int = CHUNK_ROWS,
    ) -> None:
        super().__init__(
            inter=value, intra=value, temperature=temperature, weight=weight, chunk_size=chunk_size
        )
        self.rank, self.ranked_tokens = rank, ranked_tokens

    def extra(self, student_nV: Tensor, teacher_nV: Tensor) -> Tensor | float:
        """Return the rank distance of each token: (n,)."""
        if self.rank == 0:
            return 0.0
        return self.rank * rank_distance(student_nV, teacher_nV, self.ranked_tokens)
