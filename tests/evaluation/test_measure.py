"""The figures of one model: against the teacher, against references, and None where there are none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.errors import DataError, RecipeError
from llmdistill.evaluation.measure import Evaluation
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.spies import spy

TOKENS = 6


@pytest.fixture
def teacher():
    return LocalTeacher(toy.teacher_model(), toy.tokenizer())


def prompts(number=5, **options):
    return collate(PromptDataset.of(toy.rows(number, **options), toy.tokenizer()).rows)


def evaluation(teacher, some, **options):
    return Evaluation(teacher, some, max_new_tokens=TOKENS, seed=0, **options)


def test_perplexity_is_that_of_the_given_responses(teacher):
    """By plain loops over single rows, padding ids cut before the softmax."""
    student, some = toy.model(), prompts()
    figures, _ = evaluation(teacher, some).measure(student)
    total = count = 0
    for prompt, response in zip(some.ids(), some.responses, strict=True):
        with torch.no_grad():
            logits = student(torch.tensor([[*prompt, *response]])).logits[0, :, : toy.NUM_TOKENS]
        log = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
        total -= log.gather(-1, torch.tensor(response)[:, None]).sum()
        count += len(response)
    assert figures.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_without_responses_there_is_nothing_to_compare_with(teacher):
    figures, _ = evaluation(teacher, prompts(answers=False)).measure(toy.model())
    assert (figures.perplexity, figures.rouge_l_references, figures.exact_match) == (None,) * 3
    assert figures.rouge_l_teacher >= 0


def test_the_references_are_the_data_sets_own(teacher):
    """The teacher's own answers as references: it scores all of them, ends included."""
    some = prompts()
    made = evaluation(teacher, some)
    own = tuple(map(tuple, made.reference.responses))
    figures = evaluation(
        teacher, replace(some, responses=own), answer_pattern=r"(?s)^.*$"
    ).teacher_figures()["teacher"]
    assert figures.rouge_l_references == figures.rouge_l_teacher
    assert figures.exact_match == 1.0
    other, _ = evaluation(
        teacher, replace(some, responses=own), answer_pattern=r"(?s)^.*$"
    ).measure(toy.model())
    assert other.exact_match < 1.0
    assert other.perplexity > figures.perplexity


def test_the_teacher_against_itself(teacher):
    figures = evaluation(teacher, prompts()).teacher_figures()["teacher"]
    assert figures.kl_teacher_text == pytest.approx(0, abs=1e-6)
    assert figures.top1_agreement == 1.0
    assert figures.num_bytes == 4 * figures.num_parameters


def test_the_teacher_does_not_judge_what_it_wrote_again(teacher):
    judged = spy(teacher, "judge")
    made = evaluation(teacher, prompts())
    made.teacher_figures()
    assert judged == []
    made.measure(toy.model())
    assert len(judged) == 1  # the student's samples


def test_a_reference_without_a_result_is_found_before_anything_is_written(teacher, monkeypatch):
    monkeypatch.setattr(teacher, "write", None)
    with pytest.raises(DataError, match="reference of evaluation row 0 has no match of '####'"):
        evaluation(teacher, prompts(), answer_pattern="####")
    with pytest.raises(DataError, match="have no response"):
        evaluation(teacher, prompts(answers=False), answer_pattern="####")


class Judging:
    """A teacher that is no model on this machine."""

    def __init__(self, inner, provides=None):
        self.inner, self.tokenizer = inner, inner.tokenizer
        self.provides = inner.provides if provides is None else provides
        self.judge = inner.judge


class Writing(Judging):
    def write(self, *args, **options):
        return self.inner.write(*args, **options)


def test_a_teacher_that_is_no_local_model_measures_students_all_the_same(teacher):
    expected = evaluation(teacher, prompts()).measure(toy.model())
    made = evaluation(Writing(teacher), prompts())
    assert made.teacher_figures() == {}
    found = made.measure(toy.model())
    assert found.figures.kl_own_text == pytest.approx(expected.figures.kl_own_text)
    assert found.responses == expected.responses


def test_a_teacher_that_cannot_write_or_shows_no_distribution_is_refused(teacher):
    with pytest.raises(RecipeError, match="a Judging cannot write"):
        evaluation(Judging(teacher), prompts())
    with pytest.raises(RecipeError, match="a Writing provides none"):
        evaluation(Writing(teacher, provides=frozenset()), prompts())
