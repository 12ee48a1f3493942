"""N1, N2, N9: every divergence against closed forms in float64, by hand, and against TRL."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, xlogy

from llmdistill.objectives.divergences import DIVERGENCES, forward_kl, jsd, reverse_kl


def kl64(p, q):
    return (xlogy(p, p) - xlogy(p, q)).sum(-1)


def jsd64(p, q, beta=0.5):
    if beta in (0, 1):
        return kl64(p, q) if beta == 0 else kl64(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl64(p, m) + (1 - beta) * kl64(q, m)


def skew64(p, q, alpha):
    return kl64(p, alpha * p + (1 - alpha) * q)


def adaptive64(p, q, head_mass=0.5):
    order = np.argsort(-p, -1)
    head = np.take_along_axis(p, order, -1).cumsum(-1) <= head_mass
    head[:, 0] = True
    gap = np.take_along_axis(np.abs(p - q), order, -1)
    w = (gap * head).sum(-1) / gap.sum(-1)
    return w * kl64(p, q) + (1 - w) * kl64(q, p)


def alpha_beta64(p, q, alpha, beta):
    terms = p**alpha * q**beta
    terms = terms - alpha / (alpha + beta) * p ** (alpha + beta)
    terms = terms - beta / (alpha + beta) * q ** (alpha + beta)
    return -terms.sum(-1) / (alpha * beta)


# One line a divergence: name, options, closed form of (teacher, student) probabilities.
CASES = [
    ("forward_kl", {}, kl64),
    ("reverse_kl", {}, lambda p, q: kl64(q, p)),
    ("jsd", {"beta": 0.0}, functools.partial(jsd64, beta=0)),
    ("jsd", {"beta": 0.1}, functools.partial(jsd64, beta=0.1)),
    ("jsd", {"beta": 0.5}, jsd64),
    ("jsd", {"beta": 0.9}, functools.partial(jsd64, beta=0.9)),
    ("jsd", {"beta": 1.0}, functools.partial(jsd64, beta=1)),
    ("skew_forward_kl", {}, lambda p, q: skew64(p, q, 0.1)),
    ("skew_forward_kl", {"alpha": 0.0}, kl64),
    ("skew_reverse_kl", {"alpha": 0.3}, lambda p, q: skew64(q, p, 0.3)),
    ("tvd", {}, lambda p, q: np.abs(p - q).sum(-1) / 2),
    ("adaptive_kl", {}, adaptive64),
    ("adaptive_kl", {"head_mass": 0.9}, functools.partial(adaptive64, head_mass=0.9)),
    ("alpha_beta", {}, functools.partial(alpha_beta64, alpha=0.2, beta=0.7)),
    (
        "alpha_beta",
        {"alpha": 1.5, "beta": 0.5},
        functools.partial(alpha_beta64, alpha=1.5, beta=0.5),
    ),
]
each_case = pytest.mark.parametrize(("name", "options", "closed_form"), CASES)


def logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def test_every_divergence_is_tested():
    assert {name for name, _, _ in CASES} == set(DIVERGENCES)


@each_case
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_equals_the_closed_form(name, options, closed_form, temperature):
    student, teacher = logits(7, 11, seed=1), logits(7, 11, seed=2)
    p, q = (np.exp(log_softmax(x.numpy() / temperature, -1)) for x in (teacher, student))
    found = DIVERGENCES[name](student, teacher, temperature=temperature, **options)
    np.testing.assert_allclose(found.numpy(), closed_form(p, q), rtol=1e-10)


def test_three_tokens_by_hand():
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    ln2 = math.log(2)
    assert forward_kl(student, teacher).item() == pytest.approx(0.5 * ln2 - 0.25 * ln2)
    assert reverse_kl(student, teacher).item() == pytest.approx(0.5 * ln2 - 0.25 * ln2)
    mixture = [0.375, 0.25, 0.375]
    half = 0.5 * math.log(0.5 / mixture[0]) + 0.25 * math.log(0.25 / mixture[2])
    assert jsd(student, teacher).item() == pytest.approx(half)


@pytest.mark.parametrize(
    ("name", "options", "closed_form"),
    [case for case in CASES if case[0] != "adaptive_kl"],  # its weight has no gradient: see below
)
def test_gradient_is_right(name, options, closed_form):
    student, teacher = logits(3, 5, seed=1).requires_grad_(), logits(3, 5, seed=2)
    assert torch.autograd.gradcheck(
        lambda s: DIVERGENCES[name](s, teacher, **options), (student,), atol=1e-8
    )


def test_forward_kl_gradient_is_q_minus_p():
    student, teacher = logits(4, 6, seed=1).requires_grad_(), logits(4, 6, seed=2)
    forward_kl(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


@each_case
def test_zero_at_equality_and_positive_elsewhere(name, options, closed_form):
    student, teacher = logits(50, 9, seed=1), logits(50, 9, seed=2)
    divergence = functools.partial(DIVERGENCES[name], **options)
    assert divergence(teacher, teacher).abs().max() < 1e-12
    assert (divergence(student, teacher) > 1e-3).all()


@each_case
def test_a_constant_added_to_the_logits_changes_nothing(name, options, closed_form):
    student, teacher = logits(6, 9, seed=1), logits(6, 9, seed=2)
    divergence = functools.partial(DIVERGENCES[name], **options)
    torch.testing.assert_close(
        divergence(student + 5.0, teacher - 3.0), divergence(student, teacher)
    )


@each_case
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_finite_where_a_logit_is_minus_infinity(name, options, closed_form, side):
    student, teacher = logits(4, 9, seed=1), logits(4, 9, seed=2)
    if side in ("student", "both"):
        student[:, 3] = -torch.inf
    if side in ("teacher", "both"):
        teacher[:, 3] = -torch.inf
    student.requires_grad_()
    value = DIVERGENCES[name](student, teacher, **options)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()


def gradient(divergence, student, teacher, **options):
    student = student.clone().requires_grad_()
    divergence(student, teacher, **options).sum().backward()
    return student.grad


def test_adaptive_kl_weights_are_constants():
    student, teacher = logits(8, 9, seed=1), logits(8, 9, seed=2)
    forward, reverse, both = (
        gradient(DIVERGENCES[name], student, teacher)
        for name in ("forward_kl", "reverse_kl", "adaptive_kl")
    )
    values = [DIVERGENCES[n](student, teacher) for n in ("forward_kl", "reverse_kl", "adaptive_kl")]
    w_N1 = ((values[2] - values[1]) / (values[0] - values[1]))[:, None]
    torch.testing.assert_close(both, w_N1 * forward + (1 - w_N1) * reverse)


def test_skew_kl_is_bounded_and_tends_to_kl():
    student, teacher = logits(50, 9, seed=1, scale=30), logits(50, 9, seed=2, scale=30)
    for name in ("skew_forward_kl", "skew_reverse_kl"):
        assert (DIVERGENCES[name](student, teacher, alpha=0.1) <= -math.log(0.1) + 1e-9).all()
    near = DIVERGENCES["skew_forward_kl"](student / 30, teacher / 30, alpha=1e-9)
    torch.testing.assert_close(near, forward_kl(student / 30, teacher / 30), rtol=1e-5, atol=1e-6)


def test_alpha_beta_tends_to_both_kls():
    student, teacher = logits(50, 9, seed=1, scale=1), logits(50, 9, seed=2, scale=1)
    forward = DIVERGENCES["alpha_beta"](student, teacher, alpha=1.0, beta=1e-5)
    torch.testing.assert_close(forward, forward_kl(student, teacher), rtol=1e-3, atol=1e-5)
    reverse = DIVERGENCES["alpha_beta"](student, teacher, alpha=1e-5, beta=1.0)
    torch.testing.assert_close(reverse, reverse_kl(student, teacher), rtol=1e-3, atol=1e-5)


def test_jsd_is_bounded_by_ln_2_and_symmetric():
    student, teacher = logits(50, 9, seed=1, scale=30), logits(50, 9, seed=2, scale=30)
    assert (jsd(student, teacher) <= math.log(2) + 1e-12).all()
    torch.testing.assert_close(jsd(student, teacher), jsd(teacher, student))
    torch.testing.assert_close(jsd(student, teacher, beta=0.2), jsd(teacher, student, beta=0.8))


@each_case
def test_half_precision_is_widened_before_the_softmax(name, options, closed_form):
    """The bound: the float32 result of the same bfloat16 logits, to 1e-5 relative."""
    student = logits(20, 300, seed=1, dtype=torch.float32).bfloat16()
    teacher = logits(20, 300, seed=2, dtype=torch.float32).bfloat16()
    found = DIVERGENCES[name](student, teacher, **options)
    assert found.dtype == torch.float32
    exact = DIVERGENCES[name](student.double(), teacher.double(), **options)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_trl_in_value_and_gradient(beta, temperature):
    pytest.importorskip("trl", reason="the oracle: pip install llmdistill[bench]")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(2, 6, 40, seed=1), logits(2, 6, 40, seed=2)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = GKDTrainer.generalized_jsd_loss(
        theirs, teacher, beta=beta, temperature=temperature, reduction="sum"
    )
    found = jsd(ours.flatten(0, 1), teacher.flatten(0, 1), beta=beta, temperature=temperature).sum()
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)
