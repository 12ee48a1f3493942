"""A judge scores what the teacher made: the quality of answers, the difficulty of questions.

The judge is the teacher itself or another model.  Its scores become columns of the rows, and the
filter `score` and the scorer `judge` read them (LLM as a judge, Zheng et al. 2023).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from llmdistill.instruct import prompts
from llmdistill.instruct.generators.base import Cost, TaskGenerator
from llmdistill.instruct.parse import Parsed
from llmdistill.instruct.requests import Call, Reply, Request, user
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import GREEDY

LOWEST, HIGHEST = 1.0, 10.0
ASPECTS: dict[str, Callable[[Task], str]] = {
    "quality": prompts.quality,
    "difficulty": prompts.difficulty,
}
"""What a judge can be asked for, and the prompt that asks for it."""


# The scale itself is no score: "/10", "out of 10", "from 1 (useless) to 10", "1-10".
_SCALE = re.compile(
    r"(?:/|out of|\bof)\s*10\b|\b1\b[^.\d\n]{0,30}(?:-|\u2013|\bto\b)[^.\d\n]{0,10}\b10\b",
    re.IGNORECASE,
)
_NAMED_SCORE = re.compile(
    r"\b(?:score|rating|rate|grade)\b[^\d\n-]{0,30}(\d+(?:[.,]\d+)?)", re.IGNORECASE
)
_SCORE = re.compile(r"(?<![-\d.,])\d+(?:[.,]\d+)?")


@dataclass(frozen=True)
class Judge:
    """Asks for scores from 1 to 10.  Its replies are greedy and have at most `max_new_tokens`.

    `name` is the judge's model.  It is a part of each request, so that a resumed run with another
    judge does not take the scores of the first one.
    """

    aspects: Sequence[str] = ("quality",)
    max_new_tokens: int = 16
    name: str = ""

    def scored(
        self, tasks: Sequence[Task], aspects: Sequence[str] | None = None
    ) -> Generator[list[Request], list[Reply], list[Task]]:
        """Return the tasks with their scores.  A score that a task has already is kept."""
        chosen = self.aspects if aspects is None else aspects
        asked = [
            (place, aspect)
            for place, task in enumerate(tasks)
            for aspect in chosen
            if aspect not in task.scores and (task.output or not task.is_answered)
        ]
        if not asked:
            return list(tasks)
        replies = yield [
            Request(
                user(ASPECTS[aspect](tasks[place])),
                GREEDY,
                self.max_new_tokens,
                who="judge",
                judge=self.name,
                images=tasks[place].images,
            )
            for place, aspect in asked
        ]
        found = [dict(task.scores) for task in tasks]
        for (place, aspect), reply in zip(asked, replies, strict=True):
            found[place][aspect] = score_of(reply.text)
        return [replace(task, scores=one) for task, one in zip(tasks, found, strict=True)]


class Judged(TaskGenerator):
    """A generator whose tasks are scored by a judge."""

    def __init__(self, inner: TaskGenerator, judge: Judge) -> None:
        self.inner, self.judge, self.num_calls = inner, judge, inner.num_calls

    @property
    def at_most(self) -> Cost | None:
        cost = self.inner.at_most
        if cost is None:
            return None
        more = cost.tasks * len(self.judge.aspects)
        tokens = cost.tokens + more * self.judge.max_new_tokens
        return Cost(cost.tasks, cost.requests + more, tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        made = yield from self.inner.call(number, machine)
        scored = yield from self.judge.scored(made.tasks)
        return Parsed(scored, made.dropped)


def score_of(text: str) -> float | None:
    """Return the score in a judge's reply, from 1 to 10, or None.

    It is the number after a word such as "score", or the only number.
    """
    plain = _SCALE.sub(" ", text)
    named = _NAMED_SCORE.search(plain)
    found = [named[1]] if named else _SCORE.findall(plain)
    score = float(found[0].replace(",", ".")) if len(set(found)) == 1 else 0.0
    return score if LOWEST <= score <= HIGHEST else None
