"""Drafts of a student for its teacher: what is accepted is counted, and agrees with what is expected."""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch

from llmdistill.batch import Sequences
from llmdistill.data.collate import PromptDataset, collate
from llmdistill.decoding.sample import sample
from llmdistill.evaluation import speculative as module
from llmdistill.evaluation.agreement import agreement, judge
from llmdistill.evaluation.speculative import Counts, count, measure_drafts
from llmdistill.sampling import GREEDY, Draw, Writer
from llmdistill.teachers.local import LocalTeacher
from tests import toy


@pytest.fixture
def teacher():
    return LocalTeacher(toy.teacher_model(), toy.tokenizer())


def prompts(number=4):
    return collate(PromptDataset.of(toy.rows(number), toy.tokenizer()).rows)


def close_student(noise=0.01, extra=5):
    """The teacher with a little noise, and with other padding rows in its head."""
    student = toy.teacher_model(rows=toy.NUM_TOKENS + extra)
    source = toy.teacher_model().state_dict()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(source[name][: len(parameter)])
            parameter.add_(noise * torch.randn_like(parameter))
    return student


def drafts(teacher, student, some=None, **options):
    options = {"max_new_tokens": 20, "seed": 0} | options
    return measure_drafts(teacher, student, some or prompts(), **options)


@pytest.mark.parametrize(
    ("passes", "text", "expected"),
    [
        # The prompt has the ids 1, 2.
        ([[1, 2, 7, 8, 9]], [7, 8, 9, 4], Counts(3, 3, 3)),
        ([[1, 2, 7, 8, 9]], [7, 5], Counts(3, 2, 1)),
        ([[1, 2, 7, 8, 9], [5, 6, 6]], [7, 5, 3], Counts(5, 3, 1)),
        ([[1, 2, 7, 8, 9], [5, 6, 6]], [7, 5, 6, 6, 3], Counts(5, 4, 3)),
        ([[1, 2, 7, 8]], [7, 8], Counts(2, 2, 2)),  # the last draft is an end token
        ([[1, 2, 7, 8], [4]], [3, 4], Counts(2, 1, 0)),  # no room was left for a draft
        ([[1, 2]], [3], Counts(0, 0, 0)),
    ],
)
def test_what_is_behind_a_rejected_draft_was_not_judged(passes, text, expected):
    assert count(passes, 2, text) == expected


def test_a_student_that_is_the_teacher_is_always_accepted(teacher):
    found = drafts(teacher, copy.deepcopy(teacher.model))
    for way in (found.greedy, found.sampled):
        assert way.acceptance == way.drafts_used == 1.0
        assert way.tokens_per_pass > 4


def test_an_unrelated_student_is_nearly_never_accepted(teacher):
    """Toys are unsure of everything, so each is made sure of a different token."""
    student = toy.model(seed=5)
    assert drafts(teacher, student).greedy.acceptance < 0.1
    for model, token in ((teacher.model, 70), (student, 80)):
        bias = torch.zeros(len(model.lm_head.weight))
        bias[token] = 60.0
        model.lm_head.bias = torch.nn.Parameter(bias)
    found = drafts(teacher, student, prompts(1)).sampled
    assert found.acceptance < 0.01
    assert found.tokens_per_pass < 1.1


def test_greedy_acceptance_is_the_share_of_equal_tokens(teacher, monkeypatch):
    """With one draft a pass, and on positions that a draft was for: exactly, by plain loops."""
    monkeypatch.setitem(module.DRAFTING, "num_assistant_tokens", 1)
    student, some = close_student(), prompts()
    found = drafts(teacher, student, some).greedy
    judged = accepted = 0
    options = {"max_new_tokens": 20, "draw": Draw(0), "writer": Writer.TEACHER}
    written = sample(teacher.model, teacher.tokenizer, some, GREEDY, **options)
    for prompt, response in zip(some.ids(), written.responses(), strict=True):
        place = 0
        while place < len(response) - (len(response) == 20):  # the last token is not drafted
            ids = torch.tensor([[*prompt, *response[:place]]])
            with torch.no_grad():
                top = int(student(ids).logits[0, -1, : toy.NUM_TOKENS].argmax())
            judged += 1
            accepted += top == response[place]
            place += 1 + (top == response[place])
    assert 0.2 < accepted / judged < 0.95
    assert found.acceptance == pytest.approx(accepted / judged)


def test_sampled_acceptance_is_the_one_that_is_predicted(teacher, monkeypatch):
    """The mean of sum min(p, q) on the very text that was written, within four standard errors."""
    texts = []
    write = module._write

    def kept(model, draft, prompt, options):
        made = write(model, draft, prompt, options)
        if draft is not None and options["do_sample"] and options["max_new_tokens"] > 8:
            texts.append((prompt, made.ids))
        return made

    monkeypatch.setattr(module, "_write", kept)
    student = close_student()
    found = drafts(teacher, student, prompts(8), max_new_tokens=50).sampled
    text = Sequences.pack(*zip(*texts, strict=True), range(8), writer=Writer.TEACHER, pad_id=0)
    predicted = agreement(student, judge(teacher, [text]), toy.NUM_TOKENS).acceptance
    number = sum(len(ids) for _, ids in texts)
    assert number > 200
    assert 0.2 < predicted < 0.9
    assert found.acceptance == pytest.approx(predicted, abs=4 * 0.5 / number**0.5)
    assert found.drafts_used < found.acceptance - 0.1


def test_both_models_are_left_as_they_were(teacher):
    student = close_student()
    before = [(one.generation_config, one.config.vocab_size) for one in (teacher.model, student)]
    state = torch.get_rng_state()
    drafts(teacher, student, prompts(1))
    after = [(one.generation_config, one.config.vocab_size) for one in (teacher.model, student)]
    assert after == before
    assert torch.equal(torch.get_rng_state(), state)
    assert student(torch.tensor([[5]])).logits.shape[-1] == toy.NUM_TOKENS + 5


def test_the_ratio_is_that_of_the_speeds(teacher):
    found = asdict(drafts(teacher, close_student(), prompts(2)))
    for way in found.values():
        expected = way["tokens_per_second"] / way["tokens_per_second_alone"]
        assert way["speed_ratio"] == pytest.approx(expected)
