"""CKD: tuples never repeat a prompt, and only differences of logits count.

S = tokens, K = tokens in a tuple, U = tuples, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmdistill.batch import TeacherSignal
from llmdistill.errors import TrainingError
from llmdistill.forward import read, teacher_signal
from llmdistill.objectives.ckd import (
    CkdObjective,
    differences,
    draw_tuples,
    linear,
    shuffled,
    token_keys,
)
from llmdistill.objectives.divergences import forward_kl
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.pruned import PrunedTeacher
from tests import toy
from tests.support.objectives import loss, prepared
from tests.support.spies import spy


def pair():
    return toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())


def test_three_tokens_by_hand():
    states_SH = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]])
    assert differences(states_SH, torch.tensor([[0, 1]])).tolist() == [[-2.0, 2.0]]
    # Of three tokens the first two are one group: (0 + 2) / 2 - 1.
    assert differences(states_SH, torch.tensor([[0, 2, 1]])).tolist() == [[0.0, 3.0]]


def test_a_token_against_itself_contributes_nothing():
    states_SH = torch.randn(3, 4)
    found = differences(states_SH, torch.tensor([[1, 1]]))
    assert found.abs().max() == 0
    assert forward_kl(found, found).item() == 0


def test_swapped_groups_negate_the_difference():
    states_SH = torch.randn(3, 4)
    pairs_UK = torch.tensor([[0, 1], [2, 0]])
    torch.testing.assert_close(
        differences(states_SH, pairs_UK), -differences(states_SH, pairs_UK.flip(1))
    )


def test_a_vector_that_all_tokens_share_changes_nothing():
    states_SH, shared_H = torch.randn(5, 4), 10 * torch.randn(4)
    for tuples_UK in (torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1, 4]])):
        found = differences(states_SH + shared_H, tuples_UK)
        torch.testing.assert_close(found, differences(states_SH, tuples_UK), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_a_tuple_never_repeats_a_prompt(size):
    prompt_S = torch.tensor([7, 7, 7, 7, 7, 3, 9, 9, 3, 7])
    order_S = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    tuples_SK = draw_tuples(prompt_S, order_S, size)
    assert tuples_SK[:, 0].tolist() == list(range(10))  # each token begins one
    for one in tuples_SK:
        assert len(set(prompt_S[one].tolist())) == size


def test_with_too_few_prompts_there_are_no_tuples():
    assert draw_tuples(torch.tensor([7, 7, 3]), torch.arange(3), 3).shape == (0, 3)


def test_rows_with_the_same_prompt_have_the_same_key():
    sequences = toy.sequences(4)
    twice = sequences.select(torch.tensor([0, 1, 0, 2]))
    twice = replace(twice, row_ids_B=torch.arange(4))  # two rows of a dataset, one prompt
    rows = token_keys(twice)
    prompts = [set(rows[rows[:, 0] == row, 2].tolist()) for row in range(4)]
    assert prompts[0] == prompts[2]
    assert len(set.union(*prompts)) == 3
    slots = rows[rows[:, 0] == 0, 1].tolist()
    assert slots == list(range(len(slots)))


def test_the_random_order_belongs_to_the_tokens_and_not_to_the_batch():
    keys_S3 = token_keys(toy.sequences())
    order = torch.randperm(len(keys_S3), generator=torch.Generator().manual_seed(1))
    mixed_S3 = keys_S3[order]
    assert torch.equal(mixed_S3[shuffled(mixed_S3)], keys_S3[shuffled(keys_S3)])


@pytest.mark.parametrize("group", [2, 3])
def test_is_a_plain_computation(group):
    student, teacher = pair()
    sequences = toy.sequences()
    made = prepared(CkdObjective(group=group), student, teacher)
    view = read(student, sequences, toy.NUM_TOKENS, made.student_needs)
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, made.teacher_needs)
    keys = token_keys(sequences)
    tuples = draw_tuples(keys[:, 2], shuffled(keys), group)
    logits = [view.head(view.hidden_NH), signal.distribution.head(signal.distribution.hidden_NH)]
    gaps = [differences(one, tuples) for one in logits]
    expected = 16 * forward_kl(*gaps, temperature=4.0).sum()
    found = made(view, signal, sequences)
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(expected, view.hidden_NH, retain_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, view.hidden_NH), grads, rtol=1e-3, atol=1e-4
    )


def test_tuples_need_no_further_pass_of_the_teacher():
    student, teacher = pair()
    calls = spy(teacher, "judge")
    loss(prepared(CkdObjective(), student, teacher), student, teacher, toy.sequences())
    assert len(calls) == 1


def test_responses_to_one_prompt_are_never_compared(caplog):
    """Two responses to the same prompt alone give no tuple, a finite zero, and one warning."""
    student, teacher = pair()
    alone = replace(toy.sequences().select(torch.tensor([1, 1])), row_ids_B=torch.arange(2))
    found = loss(prepared(CkdObjective(), student, teacher), student, teacher, alone)
    found.total.backward()
    assert found.total == 0
    loss(prepared(CkdObjective(), student, teacher), student, teacher, toy.sequences())
    assert caplog.text.count("fewer than 2 different prompts") == 1


def test_a_softcap_and_a_bias_are_left_out():
    _, teacher = pair()
    head = replace(
        read(teacher.model, toy.sequences(), toy.NUM_TOKENS).head, softcap=5.0, scale=2.0
    )
    plain = linear(replace(head, bias_V=torch.ones(toy.NUM_TOKENS)))
    assert plain.bias_V is None
    assert plain.softcap is None
    assert plain.scale == 2.0


def test_differences_of_a_blend_are_the_blend_of_differences():
    student, _ = pair()
    teacher = PrunedTeacher(toy.teacher_model(), toy.tokenizer(), share=0.3)
    sequences = toy.sequences()
    made = prepared(CkdObjective(), student, teacher)
    view = read(student, sequences, toy.NUM_TOKENS)
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, made.teacher_needs)
    keys = token_keys(sequences)
    tuples = draw_tuples(keys[:, 2], shuffled(keys), 2)
    teacher_NV = signal.distribution.serve()[0 : len(keys)].clone()
    gaps = [differences(one, tuples) for one in (view.head(view.hidden_NH), teacher_NV)]
    expected = 16 * forward_kl(*gaps, temperature=4.0).sum()
    torch.testing.assert_close(made(view, signal, sequences).total, expected, rtol=1e-4, atol=1e-4)


def test_a_distribution_without_states_is_refused():
    student, teacher = pair()
    sequences = toy.sequences()
    made = prepared(CkdObjective(), student, teacher)
    with pytest.raises(TrainingError, match="its distribution is a NoneType"):
        made(read(student, sequences, toy.NUM_TOKENS), TeacherSignal(), sequences)
