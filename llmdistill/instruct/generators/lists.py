"""Generators whose teacher continues a list of example tasks."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from llmdistill.instruct import prompts
from llmdistill.instruct.generators.base import (
    Answering,
    Cost,
    TaskGenerator,
    answered,
    draw_of,
    require,
)
from llmdistill.instruct.parse import (
    BETWEEN,
    NO_INPUT,
    TRUNCATED,
    UNPARSABLE,
    Parsed,
    parse_question,
    parse_tasks,
)
from llmdistill.instruct.requests import Call, Reply, Request, user
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import GREEDY, Sampling

KIND_TOKENS = 3  # enough for "yes" or "no"
SURPLUS = "more than asked for"


class Alpaca(TaskGenerator):
    """The teacher continues a list of example tasks with `tasks_per_call` new ones.

    The defaults are those of Alpaca (Taori et al. 2023).  With `answering`, a call makes one task:
    only its question comes from the list, and the teacher then answers it as if a user had asked.
    This is for small teachers, which do not keep to the form of the list.
    """

    def __init__(
        self,
        seeds: Sequence[Task],
        *,
        seed: int = 0,
        tasks_per_call: int = 17,
        examples: int = 3,
        answering: Answering | None = None,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 3072,
    ) -> None:
        require(seeds, examples)
        self.seeds, self.seed, self.answering = seeds, seed, answering
        self.tasks_per_call, self.examples = tasks_per_call, examples
        self.sampling, self.max_new_tokens = sampling, max_new_tokens

    @property
    def at_most(self) -> Cost:
        if self.answering is None:
            return Cost(self.tasks_per_call, 1, self.max_new_tokens)
        return Cost(1, 2, self.max_new_tokens + self.answering.max_new_tokens)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        chosen = draw_of(self.seed, number).sample(self.seeds, self.examples)
        last = self.examples + self.tasks_per_call
        # A teacher on this machine must continue from here, so it writes no preface.
        start = f"{BETWEEN}\n{self.examples + 1}. Instruction:"
        stop = f"{BETWEEN}\n{last + 1}." if self.answering is None else f"{last}. Output:"
        (reply,) = yield [
            Request(
                user(prompts.task_list(chosen, last)),
                self.sampling, self.max_new_tokens, start=start, stop=stop,
            )
        ]  # fmt: skip
        if reply.refused:
            return Parsed([], {reply.refused: 1})
        if self.answering is None:
            return self._listed(start, reply)
        question = parse_question(start + reply.text)
        if reply.truncated or question is None:
            return Parsed([], {TRUNCATED if reply.truncated else UNPARSABLE: 1})
        return (yield from answered([question], self.answering))

    def _listed(self, start: str, reply: Reply) -> Parsed:
        """Return the tasks of a reply that continues the list after `start`."""
        found = parse_tasks(start + reply.text, truncated=reply.truncated)
        # All tasks of a list share the log-probability of the whole reply.
        tasks = [replace(task, log_prob=reply.log_prob) for task in found.tasks]
        # A teacher that numbers its items differently never writes `stop`.
        surplus = Counter({SURPLUS: max(len(tasks) - self.tasks_per_call, 0)})
        return Parsed(tasks[: self.tasks_per_call], Counter(found.dropped) + surplus)


class SelfInstruct(TaskGenerator):
    """The teacher writes instructions, classifies them, and writes an instance of each.

    An instance is an input and its output.  If an instruction can only be answered by a few fixed
    labels (a classification), the output is written first.

    A prompt shows `examples` instructions, of which up to `machine_examples` are generated ones
    that were kept before (Wang et al. 2023, Self-Instruct).
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
        sampling: Sampling = Sampling(temperature=0.7, top_p=0.5),
        max_new_tokens: int = 1024,
        max_instance_tokens: int = 350,
    ) -> None:
        require(seeds, examples)
        self.seeds, self.classifies, self.seed = seeds, classifies, seed
        self.examples, self.machine_examples = examples, machine_examples
        self.tasks_per_call, self.sampling = tasks_per_call, sampling
        self.max_new_tokens, self.max_instance_tokens = max_new_tokens, max_instance_tokens

    @property
    def at_most(self) -> Cost:
        # One request for the list, and two for each instruction: its kind and its instance.
        tasks, each = self.tasks_per_call, self.max_instance_tokens + KIND_TOKENS
        return Cost(tasks, 1 + 2 * tasks, self.max_new_tokens + tasks * each)

    def call(self, number: int, machine: Sequence[Task]) -> Call:
        draw = draw_of(self.seed, number)
        # Early calls have few or no generated tasks to show, and take more seeds instead.
        own = draw.sample(list(machine), min(self.machine_examples, len(machine)))
        chosen = own + draw.sample(self.seeds, self.examples - len(own))
        draw.shuffle(chosen)
        # Shuffled, so that generated examples have no fixed position in the prompt.
        asked = user(prompts.instruction_list([task.instruction for task in chosen]))
        start = f"{self.examples + 1}."
        (reply,) = yield [Request(asked, self.sampling, self.max_new_tokens, start=start)]
        if reply.refused:
            return Parsed([], {reply.refused: 1})
        listed = _numbered(start + reply.text)
        dropped = Counter({TRUNCATED: 1} if reply.truncated and listed else {})
        # The last line of a text that was cut off is incomplete.
        whole = listed[:-1] if reply.truncated else listed
        instructions = whole[: self.tasks_per_call]
        dropped += Counter({SURPLUS: len(whole) - len(instructions)})
        if not instructions:
            return Parsed([], dropped or {UNPARSABLE: 1})
        # A refused question counts as "no", and the instruction is still tried.
        kinds = yield [self._kind(text, draw) for text in instructions]
        output_first = [kind.text.strip().lower().startswith("yes") for kind in kinds]
        replies = yield [
            Request(
                user(prompts.instance(text, output_first=first)), GREEDY, self.max_instance_tokens
            )
            for text, first in zip(instructions, output_first, strict=True)
        ]
        tasks: list[Task] = []
        for text, written in zip(instructions, replies, strict=True):
            if task := _instance(text, written):
                tasks.append(task)
            else:
                dropped[written.refused or UNPARSABLE] += 1
        return Parsed(tasks, dropped)

    def _kind(self, instruction: str, draw: random.Random) -> Request:
        """Return the request that asks whether an instruction is a classification.

        It shows up to 12 examples that are and 19 that are not, as in Self-Instruct.
        """
        places = [i for i, label in enumerate(self.classifies) if label]
        others = [i for i, label in enumerate(self.classifies) if not label]
        chosen = draw.sample(places, min(12, len(places))) + draw.sample(
            others, min(19, len(others))
        )
        draw.shuffle(chosen)
        examples = [self.seeds[i] for i in chosen]
        labels = [self.classifies[i] for i in chosen]
        asked = prompts.is_classification(instruction, examples, labels)
        return Request(user(asked), GREEDY, KIND_TOKENS)


def _numbered(text: str) -> list[str]:
    """Return the items of a numbered list with one item per line."""
    items = re.findall(r"^[ \t]*\d+[.)][ \t]*(\S.*)$", text, flags=re.MULTILINE)
    return [item.strip() for item in items]


def _instance(instruction: str, reply: Reply) -> Task | None:
    """Return a task with the input and output of a reply, which may come in either order.

    Returns None if a field is missing or repeated.
    """
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
        thinking=reply.thinking,
    )
