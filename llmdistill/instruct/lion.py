"""Sort tasks into hard and easy ones for a student: Lion's discrimination step.

N = predicted tokens, V = vocabulary.

In Jiang et al. 2023 (Lion), a referee scores the answers of teacher and student from 1 to 10, twice
and in both orders.  A task is hard if the teacher's mean score is higher by at least 1.

If both models run on this machine, no referee is needed: tasks are ranked by the mean KL divergence
on the teacher's answer, and a given share with the largest values is hard.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmdistill.batch import Prompts
from llmdistill.data.context import room
from llmdistill.data.formats import Example
from llmdistill.data.render import render
from llmdistill.decoding.batches import by_tokens
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

logger = logging.getLogger("llmdistill")

HARD_BY = 1.0  # gap between mean scores of the referee, which are from 1 to 10
REFEREE = Sampling(temperature=0.2)


@dataclass(frozen=True)
class Pools:
    """Tasks that are hard for the student, and tasks that are easy for it."""

    hard: list[Task]
    easy: list[Task]


def by_divergence(gaps: Sequence[float], tasks: Sequence[Task], hard_share: float) -> Pools:
    """Return pools in which the `hard_share` of the tasks with the largest gaps is hard.

    With two or more tasks, neither pool is empty.
    """
    # Ties go by place, so that every run sorts the tasks in the same way.
    order = sorted(range(len(tasks)), key=lambda place: (-gaps[place], place))
    cut = max(1, min(len(tasks) - 1, round(hard_share * len(tasks))))
    return Pools([tasks[i] for i in order[:cut]], [tasks[i] for i in order[cut:]])


def by_referee(gaps: Sequence[float | None], tasks: Sequence[Task]) -> Pools:
    """Return pools in which tasks are hard if the gap is at least `HARD_BY`.

    Tasks whose gap is None are in neither pool.
    """
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
    """Return the mean forward KL of each task in nats per token, on the teacher's greedy answer.

    The student uses the teacher's tokenizer, so both must share one vocabulary.  A task that leaves
    no room for an answer in the context of a model gets 0; a warning counts them.
    """
    tokenizer = teacher.tokenizer
    examples = [Example(user(task.prompt), None, task.instruction) for task in tasks]
    ids = [render(tokenizer, example, chat_template_kwargs)[0] for example in examples]
    configs = [one.config.get_text_config() for one in (teacher.model, student)]
    fits = min(room(config, max_new_tokens) for config in configs)
    fitting = [i for i, prompt in enumerate(ids) if len(prompt) <= fits]
    if len(fitting) < len(ids):
        logger.warning("%d tasks are too long to be compared", len(ids) - len(fitting))
    means = [0.0] * len(tasks)
    for batch in by_tokens([len(ids[i]) for i in fitting], max_new_tokens, batch_size):
        some = [fitting[place] for place in batch]
        packed = Prompts.pack([ids[i] for i in some], some, pad_id=0)
        written = teacher.write(packed, GREEDY, max_new_tokens=max_new_tokens, draw=Draw(0))
        (judged,) = judge(teacher, [written])
        # Dropout must be off, whichever mode the caller left the student in.
        with eval_mode(student):
            found = row_kl(student, judged, num_tokens(tokenizer)).tolist()
        for place, mean in zip(some, found, strict=True):
            means[place] = mean
    return means


def referee_gaps(
    responder: Responder,
    tasks: Sequence[Task],
    teachers: Sequence[Reply],
    students: Sequence[Reply],
) -> list[float | None]:
    """Return the teacher's mean score minus the student's for each task.

    A gap is None if one of them did not answer, or if the referee did not give two scores.
    """
    pairs = list(zip(teachers, students, strict=True))
    # Each pair is shown in both orders: referees tend to prefer the first answer.
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
            # In the swapped question, the teacher's score is the second one.
            gaps.append((first[0] + swapped[1] - first[1] - swapped[0]) / 2)
    return gaps


def _question(task: Task, answers: tuple[str, str]) -> Request:
    # 16 tokens are enough for two numbers.
    return Request(user(prompts.compared(task, *answers)), REFEREE, max_new_tokens=16)


def _scores(text: str) -> tuple[float, float] | None:
    """Return the two scores in a referee's reply, or None.

    The reply must contain exactly two numbers, both from 1 to 10, apart from labels such as
    "Answer 1" and from "/10".
    """
    plain = re.sub(r"[Aa]nswer\s+[12]|/\s*10\b", " ", text)
    found = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", plain)]
    if len(found) != 2 or not all(1 <= score <= 10 for score in found):
        return None
    return found[0], found[1]
