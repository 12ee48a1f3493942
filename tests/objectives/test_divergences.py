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


# One line a divergence: name, options, closed form of (teacher, student) probabilities.
CASES = [
    ("forward_kl", {}, kl64),
    ("reverse_kl", {}, lambda p, q: kl64(q, p)),
    ("jsd", {"beta": 0.0}, functools.partial(jsd64, beta=0)),
    ("jsd", {"beta": 0.1}, functools.partial(jsd64, beta=0.1)),
    ("jsd", {"beta": 0.5}, jsd64),
    ("jsd", {"beta": 0.9}, functools.partial(jsd64, beta=0.9)),
    ("jsd", {"beta": 1.0}, functools.partial(jsd64, beta=1)),
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


@each_case
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
