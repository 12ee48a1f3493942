"""Divergences between next-token distributions.

N = predicted positions, V = vocabulary.  A divergence takes logits of both models and returns one
value for each position, in nats (tvd: a probability), in float32 or wider.  It never shifts, masks
or reduces.  A probability of zero counts as exp(-10,000), so a logit of -inf on either side gives a
finite value.  In the formulas p is the teacher's probability of a token and q the student's.

To add one, write a function of (student_NV, teacher_NV, *, options) and put its name into
DIVERGENCES.  Recipes then accept its options, within the limits that BOUNDS gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOG_ZERO = -1.0e4  # the log of a probability of zero: finite, so that 0 * log(0) is 0 and not NaN

Divergence = Callable[..., Tensor]  # (student_NV, teacher_NV, *, options) -> (N,)


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute forward KL: the student learns to cover everything that the teacher finds likely.

    KL(teacher || student) = sum_V p log(p / q): (N,), in nats.  Hinton et al. 2015, section 2: a
    cross-entropy with soft targets, which differs from it by the teacher's entropy.  The factor T^2
    is not included (`scale_by_t2` of the objective multiplies by it).

    `temperature`, above 0, divides the logits of both models before the softmax.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    return kl(teacher_NV, student_NV)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute reverse KL: the student learns to avoid everything that the teacher finds unlikely.

    KL(student || teacher) = sum_V q log(q / p): (N,), in nats.  Gu et al. 2024 (MiniLLM), eq. 1, at
    one position.

    `temperature`, above 0, divides the logits of both models before the softmax.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    return kl(student_NV, teacher_NV)


def jsd(
    student_NV: Tensor, teacher_NV: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence, a bounded mix of both KLs.

    beta KL(teacher || M) + (1 - beta) KL(student || M), with the mixture
    M = beta teacher + (1 - beta) student: (N,), in nats.  Agarwal et al. 2024 (GKD), eq. 1.

    `beta`, 0 to 1, is the teacher's share of M.  0.5 is symmetric, and between 0 and 1 the value is
    at most ln 2.  As in TRL, 0 gives forward KL and 1 gives reverse KL.  The value jumps there,
    because the formula itself goes to zero at both ends.  `temperature`, above 0, divides the
    logits of both models before the softmax.
    """
    if beta in (0.0, 1.0):
        divergence = forward_kl if beta == 0.0 else reverse_kl
        return divergence(student_NV, teacher_NV, temperature=temperature)
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    p_NV, q_NV = teacher_NV.exp(), student_NV.exp()
    # Written out instead of two calls of `kl`, which would compute the exponentials again.
    mixture_NV = log_mixture(p_NV, q_NV, beta)
    forward_N = (p_NV * (teacher_NV - mixture_NV)).sum(-1)
    return beta * forward_N + (1 - beta) * (q_NV * (student_NV - mixture_NV)).sum(-1)


def skew_forward_kl(
    student_NV: Tensor, teacher_NV: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """Compute skew forward KL: forward KL to the student with some of the teacher mixed in.

    KL(teacher || alpha teacher + (1 - alpha) student): (N,), in nats, at most -ln alpha.  Ko et al.
    2024 (DistiLLM), eq. 4.

    `alpha`, 0 to 1, is the teacher's share of the mixture.  0 gives forward KL, and 1 gives zero
    everywhere.  `temperature`, above 0, divides the logits of both models before the softmax.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    if alpha == 0.0:  # Log-probabilities stay exact where the mixture's underflow.
        return kl(teacher_NV, student_NV)
    p_NV = teacher_NV.exp()
    return (p_NV * (teacher_NV - log_mixture(p_NV, student_NV.exp(), alpha))).sum(-1)


def skew_reverse_kl(
    student_NV: Tensor, teacher_NV: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """Compute skew reverse KL: reverse KL to the teacher with some of the student mixed in.

    KL(student || alpha student + (1 - alpha) teacher): (N,), in nats, at most -ln alpha.  Ko et al.
    2024 (DistiLLM), section 3.1.

    `alpha`, 0 to 1, is the student's share of the mixture.  0 gives reverse KL, and 1 gives zero
    everywhere.  `temperature`, above 0, divides the logits of both models before the softmax.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    if alpha == 0.0:
        return kl(student_NV, teacher_NV)
    q_NV = student_NV.exp()
    return (q_NV * (student_NV - log_mixture(q_NV, teacher_NV.exp(), alpha))).sum(-1)


def tvd(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the total variation distance: the probability mass that the models place differently.

    sum_V |p - q| / 2: (N,), from 0 to 1.  Wen et al. 2023 (f-distill), eq. 12.

    `temperature`, above 0, divides the logits of both models before the softmax.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    return (teacher_NV.exp() - student_NV.exp()).abs().sum(-1) / 2


def adaptive_kl(
    student_NV: Tensor, teacher_NV: Tensor, *, head_mass: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Compute adaptive KL: forward and reverse KL, weighted by where the two models differ.

    w KL(teacher || student) + (1 - w) KL(student || teacher): (N,), in nats.  w is the share of
    sum_V |p - q| that falls on the teacher's head, so forward KL counts more if the models differ
    most on the teacher's likeliest tokens.  w has no gradient.  Wu et al. 2024 (AKL), section 4.

    `head_mass`, 0 to 1, sets the head: the teacher's likeliest tokens, as long as their total
    probability is at most this; the likeliest one always belongs to it.  `temperature`, above 0,
    divides the logits of both models before the softmax.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    sorted_NV, order_NV = teacher_NV.exp().sort(-1, descending=True)
    gap_NV = (sorted_NV - student_NV.detach().exp().gather(-1, order_NV)).abs()
    head_NV = sorted_NV.cumsum(-1) <= head_mass
    head_NV[:, 0] = True
    # The clamp keeps w at 0 instead of NaN if both distributions are equal.
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
    """Compute the alpha-beta divergence, a family between forward and reverse KL.

    sum_V [(alpha p^c + beta q^c) / c - p^alpha q^beta] / (alpha beta), with c = alpha + beta: (N,),
    in nats.  Wang et al. 2025 (ABKD), definition 3.1.

    `alpha`, 0.001 to 10, is the exponent of the teacher's probabilities, and `beta`, 0.001 to 10,
    that of the student's.  (alpha, beta) near (1, 0) is close to forward KL, and near (0, 1) to
    reverse KL.  `temperature`, above 0, divides the logits of both models before the softmax.
    """
    student_NV = log_probs(student_NV, temperature)
    teacher_NV = log_probs(teacher_NV, temperature)
    c = alpha + beta
    own_NV = (alpha * (c * teacher_NV).exp() + beta * (c * student_NV).exp()) / c
    shared_NV = (alpha * teacher_NV + beta * student_NV).exp()
    return (own_NV - shared_NV).sum(-1) / (alpha * beta)


# Recipes read the names with `ast`, so the table must stay a dict literal.
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

# (lowest, highest) value of an option, None for no bound.  Recipes read this with `ast`, so it must
# stay a literal.  alpha_beta divides by alpha * beta: below a thousandth the difference loses its
# digits to rounding, and forward_kl or reverse_kl is the better choice.
BOUNDS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("jsd", "beta"): (0.0, 1.0),
    ("skew_forward_kl", "alpha"): (0.0, 1.0),
    ("skew_reverse_kl", "alpha"): (0.0, 1.0),
    ("adaptive_kl", "head_mass"): (0.0, 1.0),
    ("alpha_beta", "alpha"): (1e-3, 10.0),
    ("alpha_beta", "beta"): (1e-3, 10.0),
}


def log_probs(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature), at least LOG_ZERO, in float32 or wider: (N, V)."""
    # Half precision is widened before the softmax, so that the softmax itself does not round.
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    scaled_NV = logits_NV.to(wide)
    if temperature != 1.0:
        scaled_NV = scaled_NV / temperature
    log_NV = torch.log_softmax(scaled_NV, dim=-1)
    if log_NV.device.type == "cpu" and log_NV.detach().amin() >= LOG_ZERO:
        return log_NV  # On a CPU, the test costs less than clamping and its backward pass.
    return log_NV.clamp_min(LOG_ZERO)


def kl(from_NV: Tensor, to_NV: Tensor) -> Tensor:
    """Return KL(from || to) of two sets of log-probabilities: (N,), in nats."""
    return (from_NV.exp() * (from_NV - to_NV)).sum(-1)


def log_mixture(first_NV: Tensor, second_NV: Tensor, share: float) -> Tensor:
    """Return log(share first + (1 - share) second) of two sets of probabilities: (N, V)."""
    mixture_NV = share * first_NV + (1 - share) * second_NV
    # Both probabilities may underflow to 0.  The log of 0 is infinite, and a caller's 0 * inf NaN.
    return (mixture_NV + torch.finfo(mixture_NV.dtype).tiny).log()
