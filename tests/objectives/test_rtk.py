"""AFD and RTK: the attended distance by hand, and what the filter changes.

B = responses, M = layers of the student, N = layers of the teacher, T = tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from llmdistill.objectives.rtk import (
    FILTERS,
    RtkObjective,
    attended_distance,
    every,
    representative,
    token_energy,
)
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.objectives import loss, prepared


def test_one_response_by_hand():
    """Two layers of the teacher and of the student: softmax of (0, ln 3) is (1/4, 3/4)."""
    logits_BNM = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    gap_BNM = torch.tensor([[[4.0, 8.0], [2.0, 6.0]]])
    attended = [0.25 * 4 + 0.75 * 8, 4.0]
    assert attended_distance(logits_BNM, gap_BNM, every).item() == pytest.approx(sum(attended) / 2)
    # The best matches are ln 3 and 0, so the layers count 3/4 and 1/4, times their number.
    expected = (2 * 0.75 * attended[0] + 2 * 0.25 * attended[1]) / 2
    assert attended_distance(logits_BNM, gap_BNM, representative).item() == pytest.approx(expected)


def test_energies_of_three_tokens_by_hand():
    states_TH = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])  # mean squares 1, 2, 0
    expected_T = torch.tensor([1.0, 2.0, 0.0]) / math.sqrt(5)
    torch.testing.assert_close(token_energy(states_TH), expected_T)
    torch.testing.assert_close(token_energy(7 * states_TH), expected_T)


def test_gradients_are_right():
    draw = torch.Generator().manual_seed(0)
    states_TH = torch.randn(4, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    logits_BNM = torch.randn(2, 3, 2, generator=draw, dtype=torch.float64, requires_grad=True)
    gap_BNM = torch.rand(2, 3, 2, generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(token_energy, states_TH)
    for keep in FILTERS.values():
        assert torch.autograd.gradcheck(
            lambda a, b, keep=keep: attended_distance(a, b, keep), (logits_BNM, gap_BNM)
        )


def test_the_filter_has_mean_one_and_equal_layers_are_afd():
    logits_BNM = torch.randn(3, 4, 2)
    torch.testing.assert_close(representative(logits_BNM).mean(1), torch.ones(3))
    equal_BNM = logits_BNM[:, :1].expand(3, 4, 2)
    torch.testing.assert_close(representative(equal_BNM), every(equal_BNM))


def test_one_layer_of_each_model_is_a_plain_hint_loss():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences()
    expected = 0.0
    made = prepared(RtkObjective(num_layers=1), student, teacher)
    for row in range(len(sequences)):
        one = sequences.select(torch.tensor([row]))
        expected = expected + loss(made, student, teacher, one).total
    found = loss(made, student, teacher, sequences)
    torch.testing.assert_close(found.total, expected)
    afd = prepared(RtkObjective(num_layers=1, filter="afd"), student, teacher)
    torch.testing.assert_close(loss(afd, student, teacher, sequences).total, found.total)


def test_each_layer_of_the_teacher_attends_with_weights_that_sum_to_one():
    """With equal gaps the attended distance is that gap, whatever the logits are."""
    gap_BNM = torch.full((3, 4, 2), 0.7)
    found_B = attended_distance(torch.randn(3, 4, 2), gap_BNM, every)
    torch.testing.assert_close(found_B, torch.full((3,), 0.7))


def test_the_attention_is_trained_and_the_teacher_is_not():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    made = prepared(RtkObjective(num_layers=2), student, teacher)
    loss(made, student, teacher, toy.sequences()).total.backward()
    assert made.attention.pair_NMdd.grad.abs().max() > 0
    assert made.attention.queries[0].weight.grad.abs().max() > 0
    assert made.attention.keys[0].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.model.parameters())
