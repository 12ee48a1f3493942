"""DIST and R2KD: a dense computation, values by hand, and the memory that they take.

N = tokens, V = vocabulary, k = likeliest tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from llmdistill.forward import read, teacher_signal
from llmdistill.objectives.correlation import (
    AlongTokens,
    CorrelationObjective,
    DistObjective,
    Sums,
    cosine,
    pearson,
    rank_distance,
)
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.objectives import LargestTensor, loss, prepared

OBJECTIVES = {
    "dist": lambda **more: DistObjective(**{"inter": 0.7, "intra": 1.3, "temperature": 2.0} | more),
    "correlation": lambda **more: CorrelationObjective(**{"rank": 0.0, "temperature": 2.0} | more),
}
each = pytest.mark.parametrize("name", OBJECTIVES)


def logits(seed, number=6, vocabulary=9):
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(number, vocabulary, generator=draw, dtype=torch.float64)


def dense(name, student_NV, teacher_NV):
    """The objective in one piece, with numpy's correlation in mind: sum over tokens."""
    q_NV, p_NV = ((one.double() / 2).softmax(-1) for one in (student_NV, teacher_NV))
    mass_V = p_NV.mean(0)

    def correlated(a, b, dim):
        if name == "dist":
            a, b = (one - one.mean(dim, keepdim=True) for one in (a, b))
        return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim))

    inter, intra = (0.7, 1.3) if name == "dist" else (2.0, 2.0)
    within = inter * (1 - correlated(q_NV, p_NV, 1)).mean()
    along = intra * (1 - (mass_V * correlated(q_NV, p_NV, 0)).sum())
    return 4 * len(q_NV) * (within + along)  # 4 is the squared temperature


@each
def test_value_and_gradient_are_those_of_a_dense_computation(name):
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences(8)
    made = prepared(OBJECTIVES[name](chunk_size=7), student, teacher)
    view = read(student, sequences, toy.NUM_TOKENS, made.student_needs)
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, made.teacher_needs)
    teacher_NV = signal.distribution.head(signal.distribution.hidden_NH)
    expected = dense(name, view.head(view.hidden_NH), teacher_NV)
    found = made(view, signal, sequences).total
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for tensor in (view.hidden_NH, view.head.whole.weight_VH):
        (wanted,) = torch.autograd.grad(expected, tensor, retain_graph=True)
        (gradient,) = torch.autograd.grad(found, tensor, retain_graph=True)
        assert (gradient - wanted).abs().max() < 1e-3 * wanted.abs().max()
        found = made(view, signal, sequences).total  # its gradients can be used once


def test_three_tokens_by_hand():
    """Two entries of a vocabulary, and three tokens."""
    p_NV = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    q_NV = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(cosine(q_NV, p_NV), torch.tensor([half, 1.0, half]))
    sums = Sums.of(q_NV, p_NV)
    # Along the tokens: entry 0 has p (1/2, 1/2, 1), q (1, 1/2, 1/2); entry 1 has (1/2, 1/2, 0), ...
    cosines = [1.25 / 1.5, 0.25 / 0.5]
    expected = 1 - (2 / 3 * cosines[0] + 1 / 3 * cosines[1])
    number = torch.tensor(3)
    assert AlongTokens.of(sums, number, centred=False).distance.item() == pytest.approx(expected)
    # Pearson's r: the deviations are (-1, -1, 2) / 6 and (2, -1, -1) / 6, so r = -1/2 for both.
    assert AlongTokens.of(sums, number, centred=True).distance.item() == pytest.approx(1.5)


@pytest.mark.parametrize("centred", [False, True])
def test_gradients_are_right(centred):
    p_NV, within = logits(1).softmax(-1), pearson if centred else cosine
    q_NV = logits(2).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: within(q, p_NV), q_NV)
    number = torch.tensor(len(p_NV))

    def distance(q_NV):
        return AlongTokens.of(Sums.of(q_NV, p_NV), number, centred=centred).distance

    (expected,) = torch.autograd.grad(distance(q_NV), q_NV)
    assert torch.autograd.gradcheck(distance, q_NV)
    along = AlongTokens.of(Sums.of(q_NV.detach(), p_NV), number, centred=centred)
    slope_N = along.slope(q_NV, p_NV)
    assert slope_N.abs().max() == 0
    (found,) = torch.autograd.grad(slope_N.sum(), q_NV)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_rank_term_has_a_gradient_and_is_zero_for_the_same_order_and_gaps():
    teacher_NV = logits(1)
    student_NV = logits(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rank_distance(x, teacher_NV, 4), student_NV)
    (gradient,) = torch.autograd.grad(rank_distance(student_NV, teacher_NV, 4).sum(), student_NV)
    assert (gradient != 0).sum(1).tolist() == [4] * 6  # the teacher's four likeliest tokens
    torch.testing.assert_close(
        rank_distance(teacher_NV + 3, teacher_NV, 4), torch.zeros(6).double()
    )
    opposite = rank_distance(-teacher_NV, teacher_NV, 4)
    torch.testing.assert_close(opposite, torch.full((6,), 2.0).double())


def test_correlations_ignore_a_positive_factor():
    q_NV, p_NV = logits(1).softmax(-1), logits(2).softmax(-1)
    for within in (cosine, pearson):
        torch.testing.assert_close(within(3 * q_NV, p_NV), within(q_NV, p_NV))


@each
def test_one_token_has_nothing_along_the_batch(name):
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    one = toy.sequences(1, longest=1)
    assert one.num_predicted.sum() == 1
    options = {"inter": 0.0} if name == "dist" else {"value": 2.0}
    made = prepared(OBJECTIVES[name](**options), student, teacher)
    total = loss(made, student, teacher, one).total.item()
    if name == "dist":
        assert total == pytest.approx(0, abs=1e-5)
    assert math.isfinite(total)


def test_the_sums_of_a_large_vocabulary_are_made_a_block_at_a_time():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences(40, longest=30)
    made = prepared(DistObjective(chunk_size=16), student, teacher)
    view = read(student, sequences, toy.NUM_TOKENS, made.student_needs)
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, made.teacher_needs)
    with LargestTensor() as watch:
        made(view, signal, sequences)
    assert watch.largest < int(sequences.num_predicted.sum()) * toy.NUM_TOKENS / 4
