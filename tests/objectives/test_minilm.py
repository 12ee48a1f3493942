"""MiniLM: relations by hand, invariances, and the memory that they take.

A = relation heads, T = tokens of a row, D = width.
"""

from __future__ import annotations

import math

import pytest
import torch

from llmdistill.errors import ModelError
from llmdistill.objectives.minilm import MiniLMObjective, attention_widths, relation_kl
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.objectives import LargestTensor, loss, prepared


def states(seed, width, tokens=5):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=draw, dtype=torch.float64)


def test_three_tokens_by_hand():
    """One head of width 1: R of token i is the softmax of x_i x_j over j <= i."""
    student_TD, teacher_TD = (
        torch.tensor([[1.0], [0.0], [1.0]]),
        torch.tensor([[1.0], [1.0], [0.0]]),
    )
    found_T = relation_kl(student_TD, teacher_TD, 1)
    e = math.e
    # Token 1: teacher (e, e) / 2e, student (1, 1) / 2.  Token 2: teacher uniform over three,
    # student (e, 1, e) / (2e + 1).
    second = sum(
        math.log((1 / 3) / q) / 3 for q in (e / (2 * e + 1), 1 / (2 * e + 1), e / (2 * e + 1))
    )
    torch.testing.assert_close(found_T, torch.tensor([0.0, 0.0, second]), atol=1e-6, rtol=1e-5)


def test_gradient_is_right():
    student_TD = states(1, 4).requires_grad_()
    teacher_TD = states(2, 6)
    assert torch.autograd.gradcheck(lambda x: relation_kl(x, teacher_TD, 2).sum(), student_TD)


def test_equal_states_and_a_rotation_within_each_head_are_the_minimum():
    x_TD = states(1, 6)
    turn = torch.linalg.qr(states(3, 3, tokens=3))[0]
    turned_TD = (x_TD.unflatten(1, (2, 3)) @ turn).flatten(1)
    for one in (x_TD, turned_TD):
        torch.testing.assert_close(relation_kl(one, x_TD, 2), torch.zeros(5, dtype=torch.float64))
    assert relation_kl(states(2, 6), x_TD, 2).sum() > 1e-3


def test_no_token_sees_a_later_one_and_the_first_sees_only_itself():
    student_TD, teacher_TD = states(1, 4), states(2, 4)
    changed_TD = student_TD.clone()
    changed_TD[-1] += 5
    before, after = (relation_kl(one, teacher_TD, 2) for one in (student_TD, changed_TD))
    torch.testing.assert_close(before[:-1], after[:-1])
    assert before[0] == 0
    assert after[-1] != before[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_states_in_half_precision_stay_finite(dtype):
    student, teacher = (
        toy.model().to(dtype),
        LocalTeacher(toy.teacher_model().to(dtype), toy.tokenizer()),
    )
    made = prepared(MiniLMObjective(), student, teacher)
    found = loss(made, student, teacher, toy.sequences())
    found.total.backward()
    assert torch.isfinite(found.total)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_the_relation_heads_are_as_many_as_fit():
    """Widths 32 and 16 in the student, 48 and 24 in the teacher: 8 divides them."""
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    assert attention_widths(student.config) == (32, 16)
    assert attention_widths(teacher.config) == (48, 24)
    made = prepared(MiniLMObjective(), student, teacher)
    assert made.heads == 1  # the keys of the student are 16 wide
    assert made.relation_heads is None  # what the user said stays as it is
    assert prepared(MiniLMObjective(relation_heads=8), student, teacher).heads == 8


def test_heads_that_do_not_divide_are_refused():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    with pytest.raises(ModelError, match=r"relation_heads is 3, but it must divide .* 1, 2, 4, 8"):
        prepared(MiniLMObjective(relation_heads=3), student, teacher)


def test_the_loss_is_a_mean_over_tokens_of_three_relations():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences()
    made = prepared(MiniLMObjective(relation_heads=4), student, teacher)
    found = loss(made, student, teacher, sequences)
    assert found.num_tokens == sequences.attention_mask_BT.sum() == made.divisor(sequences)
    by_row = [
        loss(made, student, teacher, sequences.select(torch.tensor([row]))).total
        for row in range(len(sequences))
    ]
    torch.testing.assert_close(found.total, torch.stack(by_row).sum())


def test_one_row_and_one_layer_at_a_time_are_in_memory():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences(6, longest=60)
    made = prepared(MiniLMObjective(relation_heads=8, layers="uniform"), student, teacher)
    longest = sequences.input_ids_BT.shape[1]
    all_of_one_layer = len(sequences) * 8 * longest**2
    # The logits and the attention of the models are larger, so only the objective is watched.
    from llmdistill.forward import read, teacher_signal

    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, made.teacher_needs)
    view = read(student, sequences, toy.NUM_TOKENS, made.student_needs)
    with LargestTensor() as watch:
        made(view, signal, sequences)
    assert watch.largest <= 8 * longest**2 < all_of_one_layer
