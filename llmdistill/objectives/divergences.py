"""Divergences between next-token distributions.

N = predicted positions, V = vocabulary.  Logits in, nats out: one value for each position, in
float32 or wider.  A divergence never shifts, masks or reduces.  A probability of zero counts as
exp(-10,000), so a logit of -inf on either side gives a finite value.

To add one: write a function of (student_NV, teacher_NV, *, options) and name it in DIVERGENCES.  A
recipe then takes its options; BOUNDS says which values they may have.
"""

from __future__ import annotations

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
    p_NV, q_NV = teacher_NV.exp(), student_NV.exp()
    mixture_NV = log_mixture(p_NV, q_NV, beta)
    forward_N = (p_NV * (teacher_NV - mixture_NV)).sum(-1)
    return beta * forward_N + (1 - beta) * (q_NV * (student_NV - mixture_NV)).sum(-1)


def skew_forward_kl(
    student_NV: Tensor, teacher_NV: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student): (N,), at most -ln alpha.

    Ko et al. 2024 (DistiLLM), eq. 4.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    if alpha == 0.0:
        return kl(teacher_NV, student_NV)
    p_NV = teacher_NV.exp()
    return (p_NV * (teacher_NV - log_mixture(p_NV, student_NV.exp(), alpha))).sum(-1)


def skew_reverse_kl(
    student_NV: Tensor, teacher_NV: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(student || alpha student + (1 - alpha) teacher): (N,), at most -ln alpha.

    Ko et al. 2024 (DistiLLM), section 3.1.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    if alpha == 0.0:
        return kl(student_NV, teacher_NV)
    q_NV = student_NV.exp()
    return (q_NV * (student_NV - log_mixture(q_NV, teacher_NV.exp(), alpha))).sum(-1)


def tvd(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Total variation distance, sum_V |teacher - student| / 2: (N,), in [0, 1].

    Wen et al. 2023 (f-distill), eq. 12.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    return (teacher_NV.exp() - student_NV.exp()).abs().sum(-1) / 2


def adaptive_kl(
    student_NV: Tensor, teacher_NV: Tensor, *, head_mass: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """w KL(teacher || student) + (1 - w) KL(student || teacher): (N,).

    w is the share of |teacher - student| that stands in the teacher's head: its likeliest tokens up
    to a mass of `head_mass`, the first one always.  w has no gradient.  Wu et al. 2024 (AKL),
    section 4.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    sorted_NV, order_NV = teacher_NV.exp().sort(-1, descending=True)
    gap_NV = (sorted_NV - student_NV.detach().exp().gather(-1, order_NV)).abs()
    head_NV = sorted_NV.cumsum(-1) <= head_mass
    head_NV[:, 0] = True
    w_N = (gap_NV * head_NV).sum(-1) / gap_NV.sum(-1).clamp_min(1e-30)
    return w_N * kl(teacher_NV, student_NV) + (1 - w_N) * kl(student_NV, teacher_NV)


def alpha_beta(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
) -> Tensor:
    """sum_V [(alpha p^c + beta q^c) / c - p^alpha q^beta] / (alpha beta), c = alpha + beta: (N,).

    p is the teacher, q the student.  (1, 0) tends to forward KL, (0, 1) to reverse KL.  Wang et al.
    2025 (ABKD), definition 3.1.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    c = alpha + beta
    own_NV = (alpha * (c * teacher_NV).exp() + beta * (c * student_NV).exp()) / c
    shared_NV = (alpha * teacher_NV + beta * student_NV).exp()
    return (own_NV - shared_NV).sum(-1) / (alpha * beta)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
}

# (lowest, highest) value of an option, None for no bound.  alpha_beta divides by alpha * beta:
# below a thousandth its digits are lost, and forward_kl or reverse_kl says it better.
BOUNDS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("jsd", "beta"): (0.0, 1.0),
    ("skew_forward_kl", "alpha"): (0.0, 1.0),
    ("skew_reverse_kl", "alpha"): (0.0, 1.0),
    ("adaptive_kl", "head_mass"): (0.0, 1.0),
    ("alpha_beta", "alpha"): (1e-3, 10.0),
    ("alpha_beta", "beta"): (1e-3, 10.0),
}


def log_probs(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), no lower than LOG_ZERO, in float32 or wider: (N, V)."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    scaled_NV = logits_NV.to(wide)
    if temperature != 1.0:
        scaled_NV = scaled_NV / temperature
    log_NV = torch.log_softmax(scaled_NV, dim=-1)
    if log_NV.device.type == "cpu" and log_NV.detach().amin() >= LOG_ZERO:
        return log_NV  # looking is cheaper than clamping, and its backward pass
    return log_NV.clamp_min(LOG_ZERO)


def kl(from_NV: Tensor, to_NV: Tensor) -> Tensor:
    """KL(from || to) of two sets of log-probabilities: (N,)."""
    return (from_NV.exp() * (from_NV - to_NV)).sum(-1)


def log_mixture(first_NV: Tensor, second_NV: Tensor, share: float) -> Tensor:
    """log(share first + (1 - share) second), of probabilities: (N, V)."""
    mixture_NV = share * first_NV + (1 - share) * second_NV
    return (mixture_NV + torch.finfo(mixture_NV.dtype).tiny).log()  # log 0 would be no number
