"""How tasks are made.  A generator is asked for call after call; each call is a short exchange with
the teacher that ends with tasks.

Everything random is drawn from the seed and the number of the call, so a call that is made again
asks the same.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmdistill.batch import Sampling
from llmdistill.errors import DataError
from llmdistill.instruct import prompts
from llmdistill.instruct.parse import BETWEEN, NO_INPUT, Parsed, parse_tasks
from llmdistill.instruct.requests import Call, Reply, Request, user
from llmdistill.instruct.tasks import Task

SURE = Sampling(temperature=0.0)


class TaskGenerator(ABC):
    """`num_calls` is None where it can go on for ever."""

    num_calls: int | None = None

    @abstractmethod
    def call(self, number: int, machine: Sequence[Task]) -> Call:
        """The exchange of this number; `machine` are tasks that were made and kept before."""


class Alpaca(TaskGenerator):
    """Whole tasks, several a call, after three examples (Taori et al. 2023)."""

    def __init__(
        self,
        seeds: Sequence[Task],
        *,
        seed: int = 0,
        tasks_per_call: int = 17,
        examples: int = 3,
        sampling: Sampling | None = None,
        max_new_tokens: int = 3072,
    ) -> None:
        self.seeds, self.seed = seeds, seed
        self.tasks_per_call, self.examples = tasks_per_call, examples
        self.sampling, self.max_new_tokens = sampling or Sampling(), max_new_tokens

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        chosen = _random(self.seed, number).sample(self.seeds, self.examples)
        asked = user(prompts.task_list(chosen, self.examples + self.tasks_per_call))
        start = f"{BETWEEN}\n{self.examples + 1}. Instruction:"
        request = Request(asked, self.sampling, self.max_new_tokens, start=start)
        (reply,) = yield [request]
        found = parse_tasks(start + reply.text, truncated=reply.truncated)
        return Parsed(found.tasks[: self.tasks_per_call], found.unparsable)


class SelfInstruct(TaskGenerator):
    """Instructions first, then whether they classify, then an instance (Wang et al. 2023).

    Eight examples in context, of which two are machine-made once there are some.
    """

    def __init__(
        self,
        seeds: Sequence[Task],
        classifies: Sequence[bool],
        *,
        seed: int = 0,
        examples: int = 8,
        machine_examples: int = 2,
        tasks_per_call: int = 8,
        sampling: Sampling | None = None,
        max_new_tokens: int = 1024,
        max_instance_tokens: int = 350,
    ) -> None:
        self.seeds, self.classifies, self.seed = seeds, classifies, seed
        self.examples, self.machine_examples = examples, machine_examples
        self.tasks_per_call = tasks_per_call
        self.sampling = sampling or Sampling(temperature=0.7, top_p=0.5)
        self.max_new_tokens, self.max_instance_tokens = max_new_tokens, max_instance_tokens

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        draw = _random(self.seed, number)
        own = draw.sample(list(machine), min(self.machine_examples, len(machine)))
        chosen = own + draw.sample(self.seeds, self.examples - len(own))
        draw.shuffle(chosen)
        asked = user(prompts.instruction_list([task.instruction for task in chosen]))
        start = f"{self.examples + 1}."
        (reply,) = yield [Request(asked, self.sampling, self.max_new_tokens, start=start)]
        instructions = _numbered(start + reply.text, reply.truncated)[: self.tasks_per_call]
        if not instructions:
            return Parsed([], 1)
        kinds = yield [self._kind(text, draw) for text in instructions]
        output_first = [kind.text.strip().lower().startswith("yes") for kind in kinds]
        replies = yield [
            Request(
                user(prompts.instance(text, output_first=first)), SURE, self.max_instance_tokens
            )
            for text, first in zip(instructions, output_first, strict=True)
        ]
        made = [_instance(*pair) for pair in zip(instructions, replies, strict=True)]
        tasks = [task for task in made if task is not None]
        return Parsed(tasks, len(made) - len(tasks))

    def _kind(self, instruction: str, draw: random.Random) -> Request:
        """Twelve examples that classify and nineteen that do not."""
        places = [i for i, label in enumerate(self.classifies) if label]
        others = [i for i, label in enumerate(self.classifies) if not label]
        chosen = draw.sample(places, min(12, len(places))) + draw.sample(
            others, min(19, len(others))
        )
        draw.shuffle(chosen)
        examples = [self.seeds[i] for i in chosen]
        labels = [self.classifies[i] for i in chosen]
        asked = prompts.is_classification(instruction, examples, labels)
        return Request(user(asked), SURE, max_new_tokens=3)


class Magpie(TaskGenerator):
    """The teacher writes what a user would say, then answers it (Xu et al. 2024)."""

    def __init__(
        self,
        *,
        sampling: Sampling | None = None,
        answer_sampling: Sampling = SURE,
        max_instruction_tokens: int = 128,
        max_new_tokens: int = 512,
    ) -> None:
        self.sampling = sampling or Sampling(temperature=1.0, top_p=0.99)
        self.answer_sampling = answer_sampling
        self.max_instruction_tokens, self.max_new_tokens = max_instruction_tokens, max_new_tokens

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        opening = Request((), self.sampling, self.max_instruction_tokens, turn="user")
        return (yield from _varied(opening, self.answer_sampling, self.max_new_tokens))


class Answer(TaskGenerator):
    """Answers to given prompts, `samples` each; all of them are tasks."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        samples: int = 1,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        self.tasks, self.samples, self.num_calls = tasks, samples, len(tasks)
        self.sampling, self.max_new_tokens = sampling or Sampling(), max_new_tokens

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        copies = [self.tasks[number]] * self.samples
        return (yield from _answered(copies, self.sampling, self.max_new_tokens))


class Rewrite(TaskGenerator):
    """Given answers in the teacher's own words (Yang et al. 2024, SDFT); the answer that was there
    is the reference.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        self.tasks, self.num_calls = tasks, len(tasks)
        self.sampling, self.max_new_tokens = sampling or SURE, max_new_tokens

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        task = self.tasks[number]
        asked = user(prompts.rewritten(task))
        (reply,) = yield [Request(asked, self.sampling, self.max_new_tokens)]
        made = replace(
            task, output=reply.text.strip(), truncated=reply.truncated, reference=task.output
        )
        return Parsed([made], 0)


class _Variants(TaskGenerator):
    """New instructions made of given ones, with their answers."""

    def __init__(
        self,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        answer_sampling: Sampling = SURE,
        max_instruction_tokens: int = 128,
        max_new_tokens: int = 512,
    ) -> None:
        self.seed = seed
        self.sampling, self.answer_sampling = sampling or Sampling(), answer_sampling
        self.max_instruction_tokens, self.max_new_tokens = max_instruction_tokens, max_new_tokens

    def vary(self, asked: str) -> Call:
        request = Request(user(asked), self.sampling, self.max_instruction_tokens)
        return (yield from _varied(request, self.answer_sampling, self.max_new_tokens))


class Evolve(_Variants):
    """Harder and rarer variants of given tasks, in turn, with their answers."""

    def __init__(self, tasks: Sequence[Task], **options: Any) -> None:
        super().__init__(**options)
        self.tasks = tasks

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        task = _random(self.seed, number).choice(self.tasks)
        ask = prompts.harder if number % 2 else prompts.rarer
        return (yield from self.vary(ask(task)))


class Lion(_Variants):
    """New tasks like those that are hard for a student, and like the easy ones, in turn: 1:1
    against forgetting (Jiang et al. 2023); `lion.py` tells them apart.
    """

    def __init__(self, hard: Sequence[Task], easy: Sequence[Task], **options: Any) -> None:
        if not hard or not easy:
            empty = "easy" if hard else "hard"
            raise DataError(
                f"no task of the pool is {empty} for the student: give a larger or more mixed "
                "generator.pool"
            )
        super().__init__(**options)
        self.hard, self.easy = hard, easy

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        is_hard = number % 2 == 0
        task = _random(self.seed, number).choice(self.hard if is_hard else self.easy)
        ask = prompts.rarer if is_hard else prompts.alike
        return (yield from self.vary(ask(task)))


def _varied(request: Request, answer_sampling: Sampling, max_new_tokens: int) -> Call:
    """The instruction that the teacher is asked for, and its answer to it."""
    (reply,) = yield [request]
    if reply.truncated or not reply.text.strip():
        return Parsed([], 1)
    made = Task(reply.text.strip())
    return (yield from _answered([made], answer_sampling, max_new_tokens))


def _answered(tasks: list[Task], sampling: Sampling, max_new_tokens: int) -> Call:
    """The tasks with the teacher's answers."""
    replies: list[Reply] = yield [
        Request(user(task.prompt), sampling, max_new_tokens) for task in tasks
    ]
    pairs = zip(tasks, replies, strict=True)
    made = [replace(t, output=r.text.strip(), truncated=r.truncated) for t, r in pairs]
    return Parsed(made, 0)


def _random(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed}/{number}")


def _numbered(text: str, truncated: bool) -> list[str]:
    """The items of a numbered list, one a line; the last of a list that was cut off is left out."""
    items = re.findall(r"^[ \t]*\d+[.)][ \t]*(\S.*)$", text, flags=re.MULTILINE)
    return [item.strip() for item in (items[:-1] if truncated else items)]


def _instance(instruction: str, reply: Reply) -> Task | None:
    """An input and an output, in either order; None where one is missing or there twice."""
    _, *parts = re.split(r"^[ \t]*(Input|Output):[ \t]*", reply.text, flags=re.MULTILINE)
    fields = dict(zip(parts[::2], parts[1::2], strict=True))
    if sorted(parts[::2]) != ["Input", "Output"]:
        return None
    given = fields["Input"].strip()
    return Task(
        instruction,
        "" if given.lower() == NO_INPUT else given,
        fields["Output"].strip(),
        truncated=reply.truncated,
    )
