"""EmbedDistill: scores by hand, whose documents are used, and the start of the projector.

S = rows, H = width.
"""

from __future__ import annotations

import math

import pytest
import torch

from llmdistill.forward import read, teacher_signal
from llmdistill.models.taps import Need
from llmdistill.objectives.embed_distill import EmbedDistillObjective, score_loss, scores
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.objectives import loss, prepared


def test_two_prompts_and_responses_by_hand():
    prompt_SH = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    response_SH = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    found_SS = scores(prompt_SH, response_SH, 0.5)
    torch.testing.assert_close(found_SS, torch.tensor([[2.0, 2 * half], [0.0, 2 * half]]))
    student_SS = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    teacher_SS = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # 3/4 and 1/4; 1/2 and 1/2
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert score_loss(student_SS, teacher_SS).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_is_right():
    draw = torch.Generator().manual_seed(0)
    prompt_SH, response_SH, teacher_SS = (
        torch.randn(3, 3, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    assert torch.autograd.gradcheck(
        lambda x: score_loss(scores(x, response_SH, 0.3), teacher_SS), prompt_SH.requires_grad_()
    )


def test_permuted_rows_permute_the_scores_only():
    draw = torch.Generator().manual_seed(0)
    prompt_SH, response_SH = (torch.randn(4, 3, generator=draw) for _ in range(2))
    order = [2, 0, 3, 1]
    whole_SS = scores(prompt_SH, response_SH, 1.0)
    found_SS = scores(prompt_SH[order], response_SH[order], 1.0)
    torch.testing.assert_close(found_SS, whole_SS[order][:, order])


@pytest.mark.parametrize("documents", ["teacher", "student"])
def test_a_student_like_its_teacher_has_no_loss(documents):
    teacher = LocalTeacher(toy.model(), toy.tokenizer())
    made = prepared(EmbedDistillObjective(documents=documents), toy.model(), teacher)
    assert abs(loss(made, toy.model(), teacher, toy.sequences()).total.item()) < 1e-4


def states_of(made, student, teacher, sequences):
    view = read(student, sequences, toy.NUM_TOKENS, made.student_needs)
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, made.teacher_needs)
    for state in view.states.values():
        state.retain_grad()
    made(view, signal, sequences).total.backward()
    (state,) = view.states.values()
    response_N = sequences.response_mask_BT[sequences.trained_mask_BT]
    return state.grad, response_N


def test_with_the_teachers_documents_only_prompts_get_a_gradient():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    for documents, reached in (("teacher", False), ("student", True)):
        made = prepared(EmbedDistillObjective(documents=documents), student, teacher)
        grad_NH, response_N = states_of(made, student, teacher, toy.sequences())
        assert grad_NH[~response_N].abs().max() > 0
        assert bool(grad_NH[response_N].abs().max() > 0) is reached
    assert all(p.grad is None for p in teacher.model.parameters())


def test_a_projector_from_least_squares_is_closer_than_a_random_one():
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences(8)
    made = prepared(EmbedDistillObjective(distance="mse"), student, teacher)
    random = loss(made, student, teacher, sequences).total.item()
    need = Need.HIDDEN.after(-1, "all")
    mine = read(student, sequences, toy.NUM_TOKENS, [need]).states[need].detach()
    other = teacher.judge(sequences, frozenset({need})).states[need]
    prompts = [made._embed(states, sequences)[0] for states in (mine, other)]
    fitted = torch.linalg.lstsq(*prompts).solution
    with torch.no_grad():
        made.projectors[0].weight.copy_(fitted.T)
    assert loss(made, student, teacher, sequences).total.item() < 0.5 * random


def test_one_row_is_matched_without_scores():
    """A last batch may be short: its embeddings still count."""
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    made = prepared(EmbedDistillObjective(), student, teacher)
    one = toy.sequences(1)
    found = loss(made, student, teacher, one)
    assert torch.isfinite(found.total)
    assert found.total > 0
