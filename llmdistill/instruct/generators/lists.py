"""Generators whose teacher continues a list of example tasks."""

from __future__ import annotations

import random
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
    TRUNCATED,
    UNPARSABLE,
    Parsed,
    parse_instances,
    parse_list,
    parse_question,
    parse_tasks,
)
from llmdistill.instruct.requests import Call, Reply, Request, user
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import GREEDY, Sampling

KIND_TOKENS = 3  # enough for "yes" or "no"
SURPLUS = "more than asked for"
CONTRADICTION, REPEATED = "contradicting instance", "repeated instance"
INPUT_AS_OUTPUT = "output repeats the input"
# How a reply to a question for yes or no begins: teachers reply in the language of the examples.
YES = (
    *("yes", "ja", "oui", "s\u00ed", "s\u00ec", "si", "sim", "tak", "ano", "evet", "\u0434\u0430"),
    *("\u662f", "\u306f\u3044", "\ub124", "\uc608", "\u0646\u0639\u0645", "\u0939\u093e\u0901"),
)


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
        context = self.answering.context(self.seed, number)
        return (yield from answered([replace(question, context=context)], self.answering))

    def _listed(self, start: str, reply: Reply) -> Parsed:
        """Return the tasks of a reply that continues the list after `start`."""
        found = parse_tasks(start + reply.text, truncated=reply.truncated)
        # All tasks of a list share the log-probability of the whole reply.
        tasks = [replace(task, log_prob=reply.log_prob) for task in found.tasks]
        # A teacher that numbers its items differently never writes `stop`.
        surplus = Counter({SURPLUS: max(len(tasks) - self.tasks_per_call, 0)})
        return Parsed(tasks[: self.tasks_per_call], Counter(found.dropped) + surplus)


class SelfInstruct(TaskGenerator):
    """The teacher writes instructions, classifies them, and writes instances of each.

    An instance is an input and its output.  If an instruction can only be answered by a few fixed
    labels (a classification), the output is written first.

    A prompt shows `examples` instructions, of which up to `machine_examples` are generated ones
    that were kept before (Wang et al. 2023, Self-Instruct).  `classifies` says of each seed whether
    it is a classification, or None if nobody knows; `labelled` are tasks that are shown as examples
    for that question if nobody knows it of any seed.  With `only_classification`, only such seeds
    are shown.  The teacher writes up to `instances` for each instruction.
    """

    def __init__(
        self,
        seeds: Sequence[Task],
        classifies: Sequence[bool | None],
        *,
        labelled: Sequence[Task] = (),
        seed: int = 0,
        examples: int = 8,
        machine_examples: int = 2,
        only_classification: bool = False,
        tasks_per_call: int = 8,
        instances: int = 1,
        sampling: Sampling = Sampling(temperature=0.7, top_p=0.5),
        max_new_tokens: int = 1024,
        max_instance_tokens: int = 350,
    ) -> None:
        known = [replace(t, classifies=c) for t, c in zip(seeds, classifies, strict=True)]
        self._labelled = [task for task in known if task.classifies is not None] or labelled
        self.only_classification = only_classification
        self.seeds = [t for t in known if t.classifies] if only_classification else known
        require(self.seeds, examples)
        self.seed, self.examples, self.machine_examples = seed, examples, machine_examples
        self.tasks_per_call, self.instances, self.sampling = tasks_per_call, instances, sampling
        self.max_new_tokens, self.max_instance_tokens = max_new_tokens, max_instance_tokens

    @property
    def at_most(self) -> Cost:
        # One request for the list, and two for each instruction: its kind and its instances.
        tasks, each = self.tasks_per_call, self.max_instance_tokens + KIND_TOKENS
        return Cost(tasks * self.instances, 1 + 2 * tasks, self.max_new_tokens + tasks * each)

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
        listed = parse_list(f"{start} {reply.text}")
        dropped = Counter({TRUNCATED: 1} if reply.truncated and listed else {})
        # The last item of a text that was cut off is incomplete.
        whole = listed[:-1] if reply.truncated else listed
        instructions = whole[: self.tasks_per_call]
        dropped += Counter({SURPLUS: len(whole) - len(instructions)})
        if not instructions:
            return Parsed([], dropped or {UNPARSABLE: 1})
        # A refused question counts as "no", and the instruction is still tried.
        kinds = yield [self._kind(text, draw) for text in instructions]
        output_first = [kind.text.strip().lower().startswith(YES) for kind in kinds]
        replies = yield [
            Request(
                user(prompts.instance(text, output_first=first, count=self.instances)),
                GREEDY,
                self.max_instance_tokens,
            )
            for text, first in zip(instructions, output_first, strict=True)
        ]
        tasks: list[Task] = []
        for text, written in zip(instructions, replies, strict=True):
            made = _instances(text, written, self.instances)
            tasks += made.tasks
            dropped.update(made.dropped)
        return Parsed(tasks, dropped)

    def _kind(self, instruction: str, draw: random.Random) -> Request:
        """Return the request that asks whether an instruction is a classification.

        It shows up to 12 examples that are and 19 that are not, as in Self-Instruct.
        """
        ones = [task for task in self._labelled if task.classifies]
        others = [task for task in self._labelled if not task.classifies]
        chosen = draw.sample(ones, min(12, len(ones))) + draw.sample(others, min(19, len(others)))
        draw.shuffle(chosen)
        asked = prompts.is_classification(instruction, chosen)
        return Request(user(asked), GREEDY, KIND_TOKENS)


def _instances(instruction: str, reply: Reply, most: int) -> Parsed:
    """Return a task for each instance in a reply, without those that contradict each other."""
    if reply.refused:
        return Parsed([], {reply.refused: 1})
    found = parse_instances(reply.text)
    if not found:
        return Parsed([], {UNPARSABLE: 1})
    dropped: Counter[str] = Counter()
    if reply.truncated and len(found) > 1:  # the last one is incomplete
        found, dropped = found[:-1], Counter({TRUNCATED: 1})
    dropped[SURPLUS] += max(len(found) - most, 0)
    outputs: dict[str, set[str]] = {}
    for given, output in found[:most]:
        outputs.setdefault(given, set()).add(output)
    tasks: list[Task] = []
    for given, output in found[:most]:
        if len(outputs[given]) > 1:
            dropped[CONTRADICTION] += 1
        elif given and given == output:
            dropped[INPUT_AS_OUTPUT] += 1
        elif any(task.input == given for task in tasks):
            dropped[REPEATED] += 1
        else:
            made = Task(instruction, given, output, reply.truncated and len(found) == 1)
            tasks.append(replace(made, log_prob=reply.log_prob, thinking=reply.thinking))
    return Parsed(tasks, +dropped)
