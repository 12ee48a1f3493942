"""What a student lost against its start: nothing if it is the start, more the further it moves."""

from __future__ import annotations

import copy

import pytest
import torch

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.evaluation.forgetting import StartingStudent
from llmdistill.evaluation.measure import Evaluation
from llmdistill.teachers.local import LocalTeacher
from tests import toy


def prompts(**options):
    return collate(PromptDataset.of(toy.rows(5, **options), toy.tokenizer()).rows)


def starting(some, dtype=torch.float32):
    start = LocalTeacher(toy.model().to(dtype), toy.tokenizer())
    return start, StartingStudent(start, some, max_new_tokens=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_itself_has_lost_nothing(dtype):
    start, made = starting(prompts(), dtype)
    found = made.compare(copy.deepcopy(start.model))
    assert found.kl_start_text == 0.0
    assert found.perplexity_before == found.perplexity_after > 1


def test_the_figures_are_those_of_an_evaluation_with_the_start_as_teacher():
    student, some = toy.model(seed=3, layers=2), prompts()
    start, made = starting(some)
    found = made.compare(student)
    evaluation = Evaluation(start, some, max_new_tokens=6, seed=0)
    expected = evaluation.measure(student).figures
    assert found.kl_start_text == pytest.approx(expected.kl_teacher_text, rel=1e-5)
    assert found.perplexity_after == pytest.approx(expected.perplexity, rel=1e-6)
    before = evaluation.teacher_figures()["teacher"].perplexity
    assert found.perplexity_before == pytest.approx(before, rel=1e-6)
    assert abs(before - expected.perplexity) > 0.01 * before


def test_a_student_that_moved_further_has_lost_more():
    start, made = starting(prompts(answers=False))
    lost = []
    for noise in (0.001, 0.01, 0.1):
        student = copy.deepcopy(start.model)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        found = made.compare(student)
        assert found.perplexity_before is found.perplexity_after is None
        lost.append(found.kl_start_text)
    assert 0 < lost[0] < lost[1] < lost[2]
