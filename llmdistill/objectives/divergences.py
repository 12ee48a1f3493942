"""Divergences between next-token distributions.

N = predicted positions, V = vocabulary.  Logits in, nats out: one value for each position, in
float32 or wider.  A divergence never shifts, masks or reduces.  A probability of zero counts as
exp(-10,000), so a logit of -inf on either side gives a finite value.

To add one: write a function of (student_NV, teacher_NV, *, options) and name it in DIVERGENCES.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOG_ZERO = -1.0e4

Divergence = Callable[..., Tensor]  # (student_NV, teacher_NV, *, options) -> (N,)


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student): (N,).  Hinton et al. 2015, eq. 2, without the factor T^2."""
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    return kl(teacher_NV, student_NV)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher): (N,).  Gu et al. 2024 (MiniLLM), eq. 1, at one position."""
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    return kl(student_NV, teacher_NV)


def jsd(
    student_NV: Tensor, teacher_NV: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student:
    (N,).

    Agarwal et al. 2024 (GKD), eq. 1.  beta = 0 is forward KL and beta = 1 reverse KL, as in TRL:
    there the value jumps, since the formula itself goes to zero at both ends.
    """
    if beta in (0.0, 1.0):
        divergence = forward_kl if beta == 0.0 else reverse_kl
        return divergence(student_NV, teacher_NV, temperature=temperature)
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    mixture_NV = torch.logaddexp(teacher_NV + math.log(beta), student_NV + math.log1p(-beta))
    return beta * kl(teacher_NV, mixture_NV) + (1 - beta) * kl(student_NV, mixture_NV)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


def log_probs(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), no lower than LOG_ZERO, in float32 or wider: (N, V)."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    scaled_NV = logits_NV.to(wide)
    if temperature != 1.0:
        scaled_NV = scaled_NV / temperature
    return torch.log_softmax(scaled_NV, dim=-1).clamp_min(LOG_ZERO)


def kl(from_NV: Tensor, to_NV: Tensor) -> Tensor:
    """KL(from || to) of two sets of log-probabilities: (N,)."""
    return (from_NV.exp() * (from_NV - to_NV)).sum(-1)
