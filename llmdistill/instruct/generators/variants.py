"""Generators of new instructions, from nothing or from given tasks, with the teacher's answers."""

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
    """The teacher writes a user's message and then answers it (Xu et al. 2024, Magpie).

    Its prompt is only the opening of a user's turn, so no seed tasks are needed.
    """

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
    """Base of generators that turn a given task into a new instruction and answer it."""

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
        """Return the exchange that sends the prompt `asked` and answers the new instruction."""
        request = Request(user(asked), self.sampling, self.max_instruction_tokens)
        made = yield from varied(request, self.answering)
        # The variant is recorded in the row, and `Balanced` counts it.
        return Parsed([replace(task, variant=variant) for task in made.tasks], made.dropped)


class Evolve(Variants):
    """The teacher writes harder and rarer variants of the seed tasks, alternately.

    Odd calls ask for a harder variant and even ones for a rarer one.  Compare Evol-Instruct (Xu et
    al. 2023, "WizardLM").
    """

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
    """The teacher writes new tasks like those that are hard or easy for a student, alternately.

    The ratio of 1:1 keeps the student from forgetting what it can do (Jiang et al. 2023, Lion).
    `lion.py` sorts the tasks into `hard` and `easy`.  Raises DataError if either is empty.
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
