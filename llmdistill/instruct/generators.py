"""How tasks are made.  A generator is asked for call after call; each call is a short exchange with
the teacher that ends with tasks.

Everything random is drawn from the seed and the number of the call, so a call that is made again
asks the same.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from llmdistill.batch import Sampling
from llmdistill.errors import DataError
from llmdistill.instruct import prompts
from llmdistill.instruct.filters import SameResult
from llmdistill.instruct.parse import BETWEEN, NO_INPUT, UNPARSABLE, Parsed, parse_tasks
from llmdistill.instruct.requests import Call, Reply, Request, user
from llmdistill.instruct.scorers import best
from llmdistill.instruct.tasks import Task

SURE = Sampling(temperature=0.0)
KIND_TOKENS = 3  # "yes" or "no"
SURPLUS, NOT_THE_BEST = "more than asked for", "not the best sample"
HARD, EASY = "hard", "easy"
# A refusal, or talk about the task instead of an answer to it.
META = re.compile(
    r"\b(?:as an ai|language model|i(?:'m| am) sorry|i (?:cannot|can't|am unable)"
    r"|(?:given|reference|provided|original|above) answer|answer above"
    r"|(?:in )?my own words|rewritten|rephrased?)\b",
    re.IGNORECASE,
)


class Cost(NamedTuple):
    """What one call can take: tasks that it may make, requests, and tokens that are written."""

    tasks: int
    requests: int
    tokens: int


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
        _require(seeds, examples)
        self.seeds, self.seed = seeds, seed
        self.tasks_per_call, self.examples = tasks_per_call, examples
        self.sampling, self.max_new_tokens = sampling or Sampling(), max_new_tokens

    @property
    def at_most(self) -> Cost:
        return Cost(self.tasks_per_call, 1, self.max_new_tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        chosen = _random(self.seed, number).sample(self.seeds, self.examples)
        last = self.examples + self.tasks_per_call
        start, stop = f"{BETWEEN}\n{self.examples + 1}. Instruction:", f"{BETWEEN}\n{last + 1}."
        (reply,) = yield [
            Request(
                user(prompts.task_list(chosen, last)),
                self.sampling, self.max_new_tokens, start=start, stop=stop,
            )
        ]  # fmt: skip
        if reply.refused:
            return Parsed([], {reply.refused: 1})
        found = parse_tasks(start + reply.text, truncated=reply.truncated)
        tasks = [replace(task, log_prob=reply.log_prob) for task in found.tasks]
        surplus = Counter({SURPLUS: max(len(tasks) - self.tasks_per_call, 0)})
        return Parsed(tasks[: self.tasks_per_call], Counter(found.dropped) + surplus)


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
        _require(seeds, examples)
        self.seeds, self.classifies, self.seed = seeds, classifies, seed
        self.examples, self.machine_examples = examples, machine_examples
        self.tasks_per_call = tasks_per_call
        self.sampling = sampling or Sampling(temperature=0.7, top_p=0.5)
        self.max_new_tokens, self.max_instance_tokens = max_new_tokens, max_instance_tokens

    @property
    def at_most(self) -> Cost:
        tasks, each = self.tasks_per_call, self.max_instance_tokens + KIND_TOKENS
        return Cost(tasks, 1 + 2 * tasks, self.max_new_tokens + tasks * each)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        draw = _random(self.seed, number)
        own = draw.sample(list(machine), min(self.machine_examples, len(machine)))
        chosen = own + draw.sample(self.seeds, self.examples - len(own))
        draw.shuffle(chosen)
        asked = user(prompts.instruction_list([task.instruction for task in chosen]))
        start = f"{self.examples + 1}."
        (reply,) = yield [Request(asked, self.sampling, self.max_new_tokens, start=start)]
        instructions = _numbered(start + reply.text, reply.truncated)[: self.tasks_per_call]
        if reply.refused or not instructions:
            return Parsed([], {reply.refused or UNPARSABLE: 1})
        kinds = yield [self._kind(text, draw) for text in instructions]
        output_first = [kind.text.strip().lower().startswith("yes") for kind in kinds]
        replies = yield [
            Request(
                user(prompts.instance(text, output_first=first)), SURE, self.max_instance_tokens
            )
            for text, first in zip(instructions, output_first, strict=True)
        ]
        tasks: list[Task] = []
        dropped: Counter[str] = Counter()
        for text, written in zip(instructions, replies, strict=True):
            if task := _instance(text, written):
                tasks.append(task)
            else:
                dropped[written.refused or UNPARSABLE] += 1
        return Parsed(tasks, dropped)

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
        return Request(user(asked), SURE, KIND_TOKENS)


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

    @property
    def at_most(self) -> Cost:
        return Cost(1, 2, self.max_instruction_tokens + self.max_new_tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        opening = Request((), self.sampling, self.max_instruction_tokens, turn="user")
        return (yield from _varied(opening, self.answer_sampling, self.max_new_tokens))


class Answer(TaskGenerator):
    """Answers to given prompts, `samples` each: all of them, or the `best_by` a scorer."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        samples: int = 1,
        best_by: str | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        self.tasks, self.samples, self.num_calls = tasks, samples, len(tasks)
        self.best_by = best_by
        self.sampling, self.max_new_tokens = sampling or Sampling(), max_new_tokens

    @property
    def at_most(self) -> Cost:
        kept = 1 if self.best_by else self.samples
        return Cost(kept, self.samples, self.samples * self.max_new_tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        copies = [self.tasks[number]] * self.samples
        made = yield from _answered(copies, self.sampling, self.max_new_tokens)
        if self.best_by is None or not made.tasks:
            return made
        others = Counter({NOT_THE_BEST: len(made.tasks) - 1})
        return Parsed([best(made.tasks, self.best_by)], Counter(made.dropped) + others)


class Rewrite(TaskGenerator):
    """Given answers in the teacher's own words (Yang et al. 2024, SDFT).

    The given answer is the reference, and stays where the new one is cut off, empty, a refusal or
    talk about the task, or (`result`, a pattern) ends with another result.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        result: str | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        self.tasks, self.num_calls = tasks, len(tasks)
        self.same_result = None if result is None else SameResult(result)
        self.sampling, self.max_new_tokens = sampling or SURE, max_new_tokens

    @property
    def at_most(self) -> Cost:
        return Cost(1, 1, self.max_new_tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        task = self.tasks[number]
        if not task.output:
            return Parsed([], {"no answer to rewrite": 1})
        asked = user(prompts.rewritten(task))
        (reply,) = yield [Request(asked, self.sampling, self.max_new_tokens)]
        made = replace(
            task,
            output=reply.text.strip(),
            reference=task.output,
            log_prob=reply.log_prob,
            variant="rewritten",
        )
        if reply.refused or reply.truncated or not self._stands(made):
            made = replace(task, reference=task.output, variant="original")
        return Parsed([made])

    def _stands(self, made: Task) -> bool:
        same = self.same_result is None or self.same_result.reason(made) is None
        return bool(made.output) and same and not META.search(made.output)


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

    @property
    def at_most(self) -> Cost:
        return Cost(1, 2, self.max_instruction_tokens + self.max_new_tokens)

    def vary(self, asked: str, variant: str) -> Call:
        request = Request(user(asked), self.sampling, self.max_instruction_tokens)
        made = yield from _varied(request, self.answer_sampling, self.max_new_tokens)
        return Parsed([replace(task, variant=variant) for task in made.tasks], made.dropped)


class Evolve(_Variants):
    """Harder and rarer variants of given tasks, in turn, with their answers."""

    def __init__(self, tasks: Sequence[Task], **options: Any) -> None:
        super().__init__(**options)
        self.tasks = tasks

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        task = _random(self.seed, number).choice(self.tasks)
        is_harder = number % 2 == 1
        asked = (prompts.harder if is_harder else prompts.rarer)(task)
        return (yield from self.vary(asked, "harder" if is_harder else "rarer"))


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
        asked = (prompts.rarer if is_hard else prompts.alike)(task)
        return (yield from self.vary(asked, HARD if is_hard else EASY))


def _varied(request: Request, answer_sampling: Sampling, max_new_tokens: int) -> Call:
    """The instruction that the teacher is asked for, and its answer to it."""
    (reply,) = yield [request]
    if reply.refused:
        return Parsed([], {reply.refused: 1})
    if reply.truncated or not reply.text.strip():
        return Parsed([], {"endless instruction" if reply.truncated else "empty instruction": 1})
    made = Task(reply.text.strip())
    return (yield from _answered([made], answer_sampling, max_new_tokens))


def _answered(tasks: list[Task], sampling: Sampling, max_new_tokens: int) -> Call:
    """The tasks with the teacher's answers."""
    replies: list[Reply] = yield [
        Request(user(task.prompt), sampling, max_new_tokens) for task in tasks
    ]
    made = [
        replace(t, output=r.text.strip(), truncated=r.truncated, log_prob=r.log_prob)
        for t, r in zip(tasks, replies, strict=True)
        if not r.refused
    ]
    return Parsed(made, Counter(reply.refused for reply in replies if reply.refused))


def _require(seeds: Sequence[Task], examples: int) -> None:
    if len(seeds) < examples:
        raise DataError(
            f"'seeds' holds {len(seeds)} tasks, but each prompt shows {examples}: give more, or a "
            "smaller generator.examples"
        )


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
        log_prob=reply.log_prob,
    )
