"""Which tasks are hard for a student: where its answers fall behind its teacher's.

N = predicted tokens, V = vocabulary.  Jiang et al. 2023 (Lion), the step of discrimination: a
referee scores both answers from 1 to 10, twice, with their places swapped; a task is hard where the
teacher's mean score is higher by 1 or more.  With both models at hand the mean KL on the teacher's
answer says it without a referee, and the hardest share of the tasks is hard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmdistill.batch import Prompts
from llmdistill.data.formats import Example
from llmdistill.data.render import render
from llmdistill.evaluation.agreement import judge, row_kl
from llmdistill.instruct import prompts
from llmdistill.instruct.requests import Asked, Reply, Request, user
from llmdistill.instruct.responders import Responder
from llmdistill.instruct.tasks import Task
from llmdistill.models.heads import eval_mode
from llmdistill.models.vocabulary import num_tokens
from llmdistill.sampling import GREEDY, Draw, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.teachers.local import LocalTeacher

HARD_BY = 1.0  # points of the referee
REFEREE = Sampling(temperature=0.2)


@dataclass(frozen=True)
class Pools:
    """Tasks that are hard for the student, and those that are easy."""

    hard: list[Task]
    easy: list[Task]


def by_divergence(gaps: Sequence[float], tasks: Sequence[Task], hard_share: float) -> Pools:
    """The share of the tasks with the largest gaps is hard."""
    order = sorted(range(len(tasks)), key=lambda place: (-gaps[place], place))
    cut = max(1, min(len(tasks) - 1, round(hard_share * len(tasks))))
    return Pools([tasks[i] for i in order[:cut]], [tasks[i] for i in order[cut:]])


def by_referee(gaps: Sequence[float | None], tasks: Sequence[Task]) -> Pools:
    """Hard where the teacher is better by a point or more; unscored tasks are in neither pool."""
    scored = [(gap, task) for gap, task in zip(gaps, tasks, strict=True) if gap is not None]
    return Pools(
        [task for gap, task in scored if gap >= HARD_BY],
        [task for gap, task in scored if gap < HARD_BY],
    )


@torch.no_grad()
def divergences(
    teacher: LocalTeacher,
    student: PreTrainedModel,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    batch_size: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[float]:
    """Mean forward KL in nats per token on the teacher's greedy answer to each task."""
    tokenizer = teacher.tokenizer
    examples = [Example(user(task.prompt), None, task.instruction) for task in tasks]
    ids = [render(tokenizer, example, chat_template_kwargs)[0] for example in examples]
    means: list[float] = []
    for start in range(0, len(tasks), batch_size):
        some = range(start, min(start + batch_size, len(tasks)))
        packed = Prompts.pack([ids[i] for i in some], some, pad_id=0)
        written = teacher.write(packed, GREEDY, max_new_tokens=max_new_tokens, draw=Draw(0))
        (judged,) = judge(teacher, [written])
        with eval_mode(student):
            means += row_kl(student, judged, num_tokens(tokenizer)).tolist()
    return means


def referee_gaps(
    responder: Responder,
    tasks: Sequence[Task],
    teachers: Sequence[Reply],
    students: Sequence[Reply],
) -> list[float | None]:
    """The teacher's mean score less the student's; None where one did not answer, or the referee
    gave no two numbers.
    """
    pairs = list(zip(teachers, students, strict=True))
    asked = [
        Asked(number, 0, place, _question(task, (first.text, second.text)))
        for number, (task, pair) in enumerate(zip(tasks, pairs, strict=True))
        for place, (first, second) in enumerate((pair, pair[::-1]))
    ]
    scores = [_scores(reply.text) for reply in responder.respond(asked)]
    gaps: list[float | None] = []
    for pair, first, swapped in zip(pairs, scores[::2], scores[1::2], strict=True):
        if first is None or swapped is None or any(reply.refused for reply in pair):
            gaps.append(None)
        else:
            gaps.append((first[0] + swapped[1] - first[1] - swapped[0]) / 2)
    return gaps


def _question(task: Task, answers: tuple[str, str]) -> Request:
    return Request(user(prompts.compared(task, *answers)), REFEREE, max_new_tokens=16)


def _scores(text: str) -> tuple[float, float] | None:
    """A referee's two numbers from 1 to 10, where it said no others; labels and "/10" aside."""
    plain = re.sub(r"[Aa]nswer\s+[12]|/\s*10\b", " ", text)
    found = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", plain)]
    if len(found) != 2 or not all(1 <= score <= 10 for score in found):
        return None
    return found[0], found[1]
