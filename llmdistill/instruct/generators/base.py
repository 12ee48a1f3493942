"""The base class of generators, and the exchanges that several of them share."""

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
    """Upper bounds for one call: its tasks, its requests, and the tokens of all replies."""

    tasks: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class Answering:
    """How the teacher answers a task.

    `hint` is appended to the prompt that the teacher sees.  The row has the resulting answer, but
    not the hint (context distillation, Askell et al. 2021).
    """

    sampling: Sampling = GREEDY
    max_new_tokens: int = 512
    hint: str = ""

    def request(self, task: Task) -> Request:
        """Return the request for the answer to a task."""
        asked = f"{task.prompt}\n\n{self.hint}" if self.hint else task.prompt
        messages = (*task.context, *user(asked))
        return Request(messages, self.sampling, self.max_new_tokens, images=task.images)


class TaskGenerator(ABC):
    """Base of all generators.  `num_calls` is None if the number of calls has no limit."""

    num_calls: int | None = None

    @property
    @abstractmethod
    def at_most(self) -> Cost:
        """Upper bounds for one call."""

    @abstractmethod
    def call(self, number: int, machine: Sequence[Task]) -> Call:
        """Return the exchange of call `number`.

        `machine` are the generated tasks that were kept in earlier rounds.
        """


def varied(request: Request, answering: Answering) -> Call:
    """Return the instruction that a request makes the teacher write, with the teacher's answer.

    A truncated or empty instruction is dropped and not answered.
    """
    (reply,) = yield [request]
    if reply.refused:
        return Parsed([], {reply.refused: 1})
    # Half an instruction may still look whole, so it is not answered.
    if reply.truncated or not reply.text.strip():
        return Parsed([], {"endless instruction" if reply.truncated else "empty instruction": 1})
    made = Task(reply.text.strip())
    return (yield from answered([made], answering))


def answered(tasks: list[Task], answering: Answering) -> Call:
    """Return the tasks with the teacher's answers; refused requests are counted as dropped."""
    replies: list[Reply] = yield [answering.request(task) for task in tasks]
    made = [
        replace(
            t,
            output=r.text.strip(),
            truncated=r.truncated,
            log_prob=r.log_prob,
            thinking=r.thinking,
        )
        for t, r in zip(tasks, replies, strict=True)
        if not r.refused
    ]
    return Parsed(made, Counter(reply.refused for reply in replies if reply.refused))


def require(seeds: Sequence[Task], examples: int) -> None:
    """Raise DataError if there are fewer seed tasks than one prompt needs."""
    if len(seeds) < examples:
        raise DataError(
            f"'seed_tasks' has {len(seeds)} tasks, but each prompt needs {examples}. Add seed "
            "tasks, or lower generator.examples."
        )


def draw_of(seed: int, number: int) -> random.Random:
    """Return the random generator of one call."""
    # Seeded with a string, which Python hashes with SHA-512: the same on every machine and run.
    return random.Random(f"{seed}/{number}")
