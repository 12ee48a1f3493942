"""What every generator is, and the exchanges that several of them share."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmdistill.errors import DataError
from llmdistill.instruct.parse import Parsed
from llmdistill.instruct.requests import Call, Reply, Request, user
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import GREEDY, Sampling


class Cost(NamedTuple):
    """What one call can take: tasks that it may make, requests, and tokens that are written."""

    tasks: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class Answering:
    """How a task is answered.

    `hint` stands below it for the teacher alone: the row has the answer that it brought about, and
    not the hint (context distillation, Askell et al. 2021).
    """

    sampling: Sampling = GREEDY
    max_new_tokens: int = 512
    hint: str = ""

    def request(self, task: Task) -> Request:
        asked = f"{task.prompt}\n\n{self.hint}" if self.hint else task.prompt
        return Request(user(asked), self.sampling, self.max_new_tokens)


class TaskGenerator(ABC):
    """`num_calls` is None where it can go on for ever."""

    num_calls: int | None = None

    @property
    @abstractmethod
    def at_most(self) -> Cost:
        """The upper bounds of one call."""

    @abstractmethod
    def call(self, number: int, machine: Sequence[Task]) -> Call:
        """The exchange of this number; `machine` are tasks that were made and kept before."""


def varied(request: Request, answering: Answering) -> Call:
    """The instruction that the teacher is asked for, and its answer to it."""
    (reply,) = yield [request]
    if reply.refused:
        return Parsed([], {reply.refused: 1})
    if reply.truncated or not reply.text.strip():
        return Parsed([], {"endless instruction" if reply.truncated else "empty instruction": 1})
    made = Task(reply.text.strip())
    return (yield from answered([made], answering))


def answered(tasks: list[Task], answering: Answering) -> Call:
    """The tasks with the teacher's answers."""
    replies: list[Reply] = yield [answering.request(task) for task in tasks]
    made = [
        replace(t, output=r.text.strip(), truncated=r.truncated, log_prob=r.log_prob)
        for t, r in zip(tasks, replies, strict=True)
        if not r.refused
    ]
    return Parsed(made, Counter(reply.refused for reply in replies if reply.refused))


def require(seeds: Sequence[Task], examples: int) -> None:
    """Raises DataError if there are too few seed tasks for the examples of a prompt."""
    if len(seeds) < examples:
        raise DataError(
            f"'seed_tasks' has {len(seeds)} tasks, but each prompt needs {examples}. Add seed "
            "tasks, or lower generator.examples."
        )


def draw_of(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed}/{number}")
