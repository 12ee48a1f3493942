"""Hard and easy, by divergence and by a referee."""

from __future__ import annotations

import pytest

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.errors import DataError
from llmdistill.evaluation.agreement import agreement, judge
from llmdistill.instruct.generators.variants import Lion
from llmdistill.instruct.lion import by_divergence, by_referee, divergences, referee_gaps
from llmdistill.instruct.requests import Reply
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import Draw, Sampling
from llmdistill.teachers.local import LocalTeacher
from tests import toy

TASKS = [Task(f"Do thing {i} " * (1 + i % 3)) for i in range(7)]


def test_the_gap_of_a_task_is_the_mean_divergence_on_the_teachers_answer():
    teacher, student = LocalTeacher(toy.teacher_model(), toy.tokenizer()), toy.model()
    teacher.model.lm_head.weight.data[2] *= 2  # answers of several lengths
    found = divergences(teacher, student, TASKS, max_new_tokens=9, batch_size=3)
    for task, gap in zip(TASKS, found, strict=True):
        rows = PromptDataset.of([{"instruction": task.prompt, "input": ""}], toy.tokenizer()).rows
        written = teacher.write(collate(rows), Sampling(0.0), max_new_tokens=9, draw=Draw(0))
        alone = agreement(student, judge(teacher, [written]), toy.NUM_TOKENS)
        assert gap == pytest.approx(alone.forward_kl, rel=1e-4)
    assert divergences(
        teacher, teacher.model, TASKS, max_new_tokens=9, batch_size=7
    ) == pytest.approx([0] * 7, abs=1e-5)


@pytest.mark.parametrize(("share", "hard"), [(0.5, 4), (0.1, 1), (0.01, 1), (0.99, 6)])
def test_the_largest_gaps_are_hard(share, hard):
    gaps = [0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6]
    pools = by_divergence(gaps, TASKS, share)
    assert pools.hard == [TASKS[i] for i in (1, 3, 5, 6, 2, 4, 0)][:hard]
    assert sorted(pools.hard + pools.easy, key=TASKS.index) == TASKS


def replies(texts):
    return [Reply(text) for text in texts]


class Referee:
    """Scores by the length of an answer, and likes the first one a little more."""

    def __init__(self, replies=None) -> None:
        self.replies, self.asked = replies, []

    def respond(self, asked):
        self.asked += asked
        if self.replies is not None:
            return [Reply(text) for text in self.replies]
        texts = [one.request.messages[0]["content"] for one in asked]
        answers = [
            (t.split("Answer 1:\n")[1].split("\n")[0], t.split("Answer 2:\n")[1].split("\n")[0])
            for t in texts
        ]
        return [Reply(f"{len(first) + 1} {len(second)}") for first, second in answers]


def test_a_referees_taste_for_the_first_cancels_out():
    teachers, students = ["aaaaa", "aa"], ["aaa", "aaaa"]
    gaps = referee_gaps(Referee(), TASKS[:2], replies(teachers), replies(students))
    assert gaps == [2.0, -2.0]
    swapped = referee_gaps(Referee(), TASKS[:2], replies(students), replies(teachers))
    assert swapped == [-2.0, 2.0]
    silent = [Reply("", refused="no"), Reply("aa")]
    assert referee_gaps(Referee(), TASKS[:2], silent, replies(students)) == [None, -2.0]


@pytest.mark.parametrize("reply", ["I cannot say", "8", "8 and 11", "0 5", "8 6 because 2 facts"])
def test_a_task_without_two_scores_is_in_no_pool(reply):
    gaps = referee_gaps(
        Referee([reply, "7 6", "9 5", "5 9"]), TASKS[:2], replies("ab"), replies("cd")
    )
    assert gaps == [None, 4.0]
    pools = by_referee(gaps, TASKS[:2])
    assert (pools.hard, pools.easy) == ([TASKS[1]], [])


@pytest.mark.parametrize("reply", ["8 6", "Answer 1: 8\nAnswer 2: 6", "8/10 and 6/10.", "8.0, 6"])
def test_the_ways_in_which_referees_write_two_scores(reply):
    assert referee_gaps(Referee([reply, "6 8"]), TASKS[:1], replies("a"), replies("b")) == [2.0]


def test_a_gap_of_one_point_is_hard():
    pools = by_referee([1.0, 0.99, -3.0], TASKS[:3])
    assert pools.hard == TASKS[:1]
    assert pools.easy == TASKS[1:3]


def test_lion_asks_for_rarer_hard_ones_and_for_more_easy_ones_in_turn():
    lion = Lion(TASKS[:1], TASKS[1:2])
    texts = [next(lion.call(number, []))[0].messages[0]["content"] for number in range(4)]
    assert ["much less common" in text for text in texts] == [True, False, True, False]
    assert [text.startswith(TASKS[number % 2].prompt) for number, text in enumerate(texts)] == [
        True
    ] * 4


@pytest.mark.parametrize(("hard", "easy", "said"), [([], TASKS, "is hard"), (TASKS, [], "is easy")])
def test_an_empty_pool_is_named(hard, easy, said):
    with pytest.raises(DataError, match=f"no task in generator.pool {said} for the student"):
        Lion(hard, easy)
