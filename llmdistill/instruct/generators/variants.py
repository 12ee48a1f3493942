"""New instructions, out of nothing or out of given ones, each with the teacher's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmdistill.errors import DataError
from llmdistill.instruct import prompts
from llmdistill.instruct.generators.base import (
    Answering,
    Cost,
    TaskGenerator,
    draw_of,
    require,
    varied,
)
from llmdistill.instruct.parse import Parsed
from llmdistill.instruct.requests import Call, Request, user
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import Sampling

HARD, EASY = "hard", "easy"


class Magpie(TaskGenerator):
    """The teacher writes what a user would say, then answers it (Xu et al. 2024)."""

    def __init__(
        self,
        *,
        sampling: Sampling = Sampling(temperature=1.0, top_p=0.99),
        answering: Answering = Answering(),
        max_instruction_tokens: int = 128,
    ) -> None:
        self.sampling, self.answering = sampling, answering
        self.max_instruction_tokens = max_instruction_tokens

    @property
    def at_most(self) -> Cost:
        return Cost(1, 2, self.max_instruction_tokens + self.answering.max_new_tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        opening = Request((), self.sampling, self.max_instruction_tokens, turn="user")
        return (yield from varied(opening, self.answering))


class Variants(TaskGenerator):
    """New instructions made of given ones, with their answers."""

    def __init__(
        self,
        *,
        seed: int = 0,
        sampling: Sampling = Sampling(),
        answering: Answering = Answering(),
        max_instruction_tokens: int = 128,
    ) -> None:
        self.seed, self.sampling, self.answering = seed, sampling, answering
        self.max_instruction_tokens = max_instruction_tokens

    @property
    def at_most(self) -> Cost:
        return Cost(1, 2, self.max_instruction_tokens + self.answering.max_new_tokens)

    def vary(self, asked: str, variant: str) -> Call:
        request = Request(user(asked), self.sampling, self.max_instruction_tokens)
        made = yield from varied(request, self.answering)
        return Parsed([replace(task, variant=variant) for task in made.tasks], made.dropped)


class Evolve(Variants):
    """Harder and rarer variants of given tasks, in turn, with their answers."""

    def __init__(self, tasks: Sequence[Task], **options: Any) -> None:
        require(tasks, 1)
        super().__init__(**options)
        self.tasks = tasks

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        task = draw_of(self.seed, number).choice(self.tasks)
        is_harder = number % 2 == 1
        asked = (prompts.harder if is_harder else prompts.rarer)(task)
        return (yield from self.vary(asked, "harder" if is_harder else "rarer"))


class Lion(Variants):
    """New tasks like those that are hard for a student, and like the easy ones, in turn: 1:1
    against forgetting (Jiang et al. 2023); `lion.py` tells them apart.
    """

    def __init__(self, hard: Sequence[Task], easy: Sequence[Task], **options: Any) -> None:
        if not hard or not easy:
            empty = "easy" if hard else "hard"
            raise DataError(
                f"no task in generator.pool is {empty} for the student. Use a larger or more "
                "varied pool."
            )
        super().__init__(**options)
        self.hard, self.easy = hard, easy

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        is_hard = number % 2 == 0
        task = draw_of(self.seed, number).choice(self.hard if is_hard else self.easy)
        asked = (prompts.rarer if is_hard else prompts.alike)(task)
        return (yield from self.vary(asked, HARD if is_hard else EASY))
