"""Generators of new instructions, from nothing or from given tasks, with the teacher's answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmdistill.errors import DataError
from llmdistill.evaluation.words import count_words
from llmdistill.instruct import prompts
from llmdistill.instruct.generators.base import (
    Answering,
    Cost,
    TaskGenerator,
    answered,
    draw_of,
    require,
    why_no_question,
)
from llmdistill.instruct.parse import Parsed, asked_text
from llmdistill.instruct.requests import Call, Request, user
from llmdistill.instruct.similarity import rouge_l
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import Sampling

HARD, EASY = "hard", "easy"
FAILED = "failed evolution"
COPIED = 0.9  # ROUGE-L F from which a new task counts as a copy of the given one
SORRY_WORDS = 80  # an apology with fewer words is no answer
EVOLUTIONS: dict[str, Callable[[Task], str]] = {
    "rarer": prompts.rarer,
    "harder": prompts.harder,
    "constrained": prompts.constrained,
    "deeper": prompts.deeper,
    "concrete": prompts.concrete,
    "reasoning": prompts.reasoning,
}
"""Ways to evolve a task (Xu et al. 2023, WizardLM: in depth, and in breadth by `rarer`)."""
# A reply about the task in place of a new one.
_ABOUT = re.compile(
    r"\b(?:(?:given|original|new|created|evolved|above) prompt"
    r"|rewritten (?:prompt|task|instruction)|(?:prompt|task|instruction) above|as an ai"
    r"|i(?:['\u2019]m| am) sorry|i (?:cannot|can['\u2019]t|am unable))\b",
    re.IGNORECASE,
)


class Magpie(TaskGenerator):
    """The teacher writes a user's message and then answers it (Xu et al. 2024, Magpie).

    Its prompt is only the opening of a user's turn, so no seed tasks are needed.  With several
    `turns` it goes on as the user after each answer.  A conversation ends early if a turn fails.
    With `one_line` a question ends at its first line end.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        sampling: Sampling = Sampling(temperature=1.0, top_p=0.99),
        answering: Answering | None = Answering(),
        max_instruction_tokens: int = 128,
        turns: int = 1,
        one_line: bool = False,
    ) -> None:
        self.seed, self.sampling, self.answering = seed, sampling, answering
        self.max_instruction_tokens = max_instruction_tokens
        self.turns, self.one_line = turns, one_line

    @property
    def at_most(self) -> Cost:
        answer = self.answering.max_new_tokens if self.answering else 0
        tokens = self.turns * (self.max_instruction_tokens + answer)
        return Cost(1, self.turns * (1 + (self.answering is not None)), tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        context = self.answering.context(self.seed, number) if self.answering else ()
        last: Task | None = None  # the conversation so far
        for _ in range(self.turns):
            before = last.messages_after() if last else context
            (said,) = yield [
                Request(
                    before, self.sampling, self.max_instruction_tokens, turn="user",
                    stop="\n" if self.one_line else "",
                )
            ]  # fmt: skip
            if reason := why_no_question(said):
                return self._ended(last, {reason: 1})
            turns = (*last.turns, (last.prompt, last.output)) if last else ()
            made = yield from answered(
                [Task(said.text.strip(), context=context, turns=turns)], self.answering
            )
            if not made.tasks or (last and not _is_whole(made.tasks[0])):
                return self._ended(last, made.dropped)
            last = made.tasks[0]
            if not _is_whole(last):
                break
        return self._ended(last, {})

    def _ended(self, task: Task | None, dropped: Mapping[str, int]) -> Parsed:
        if task is None:
            return Parsed([], dropped)
        variant = f"{len(task.turns) + 1} turns" if self.turns > 1 else ""
        return Parsed([replace(task, variant=variant)])


class Variants(TaskGenerator):
    """Base of generators that turn a given task into a new instruction and answer it."""

    def __init__(
        self,
        *,
        seed: int = 0,
        sampling: Sampling = Sampling(),
        answering: Answering | None = Answering(),
        max_instruction_tokens: int = 128,
    ) -> None:
        self.seed, self.sampling, self.answering = seed, sampling, answering
        self.max_instruction_tokens = max_instruction_tokens

    @property
    def at_most(self) -> Cost:
        answer = self.answering.max_new_tokens if self.answering else 0
        requests = 1 + (self.answering is not None)
        return Cost(1, requests, self.max_instruction_tokens + answer)

    def vary(self, number: int, given: Task, steps: Sequence[tuple[str, str]]) -> Call:
        """Return the exchange that changes a task step by step and answers the result.

        A step is the name of the variant, which is recorded in the row, and a prompt in which
        `{task}` stands for the task.  If a step fails, the task before it is answered.
        """
        task, reason = given, ""
        names: list[str] = []
        for name, template in steps:
            asked = user(template.replace("{task}", task.prompt))
            (reply,) = yield [Request(asked, self.sampling, self.max_instruction_tokens)]
            text = asked_text(reply.text)
            reason = why_no_question(replace(reply, text=text)) or _why_failed(task, text)
            if reason:
                break
            task, names = Task(text), [*names, name]
        if not names:
            return Parsed([], {reason: 1})
        context = self.answering.context(self.seed, number) if self.answering else ()
        variant = ", ".join(names)
        made = yield from answered(
            [replace(task, context=context, variant=variant)], self.answering
        )
        if any(_is_sorry(task.output) for task in made.tasks):
            return Parsed([], {FAILED: 1})
        return made


class Evolve(Variants):
    """The teacher changes the seed tasks in different `ways` (keys of `EVOLUTIONS`), in turn.

    `own_ways` are more of them: a name, and a prompt in which `{task}` stands for the task.  With
    several `steps` a task is changed several times, each time in the next way (Xu et al. 2023,
    WizardLM).  An evolution has failed if it copies the task or talks about it, or if the answer is
    an apology.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        ways: Sequence[str] = ("rarer", "harder"),
        own_ways: Mapping[str, str] | None = None,
        steps: int = 1,
        **options: Any,
    ) -> None:
        require(tasks, 1)
        super().__init__(**options)
        self.tasks, self.ways, self.own_ways, self.steps = tasks, ways, own_ways, steps
        known = {name: EVOLUTIONS[name](Task("{task}")) for name in ways} | dict(own_ways or {})
        self._templates = list(known.items())

    @property
    def at_most(self) -> Cost:
        cost = super().at_most
        more = self.steps - 1
        tokens = cost.tokens + more * self.max_instruction_tokens
        return Cost(1, cost.requests + more, tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        task = draw_of(self.seed, number).choice(self.tasks)
        places = range(number, number + self.steps)
        steps = [self._templates[place % len(self._templates)] for place in places]
        return (yield from self.vary(number, task, steps))


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
        template = (prompts.rarer if is_hard else prompts.alike)(Task("{task}"))
        return (yield from self.vary(number, task, [(HARD if is_hard else EASY, template)]))


def _is_whole(task: Task) -> bool:
    """Whether a conversation can go on after this turn."""
    return task.is_answered and not task.truncated and bool(task.output)


def _why_failed(given: Task, text: str) -> str:
    """Return FAILED if a text is no new task, or "" if it is one."""
    is_copy = rouge_l(text, given.prompt) > COPIED
    return FAILED if is_copy or _ABOUT.search(text) else ""


def _is_sorry(answer: str) -> bool:
    return re.search(r"\bsorry\b", answer, re.IGNORECASE) is not None and (
        count_words(answer) < SORRY_WORDS
    )
