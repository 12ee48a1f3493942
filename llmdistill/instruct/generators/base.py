"""The base class of generators, and the exchanges that several of them share."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmdistill.data.formats import Message
from llmdistill.errors import DataError
from llmdistill.instruct.parse import Parsed, unfenced
from llmdistill.instruct.requests import Call, Reply, Request, user
from llmdistill.instruct.tasks import Task
from llmdistill.sampling import GREEDY, Sampling

NO_JSON = "not the JSON that was asked for"


class Cost(NamedTuple):
    """Upper bounds for one call: its tasks, its requests, and the tokens of all replies."""

    tasks: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class SystemPrompt:
    """A system prompt, and how often it is drawn in comparison with others."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Answering:
    """How the teacher answers a task.

    `hint` is appended to the prompt that the teacher sees.  The row has the resulting answer, but
    not the hint (context distillation, Askell et al. 2021).  One of the `system` prompts is drawn
    for each call, and stays in the row.  `schema` is the JSON schema of the answer, or "".
    """

    sampling: Sampling = GREEDY
    max_new_tokens: int = 512
    hint: str = ""
    system: tuple[SystemPrompt, ...] = ()
    schema: str = ""

    def request(self, task: Task) -> Request:
        """Return the request for the answer to a task."""
        asked = f"{task.prompt}\n\n{self.hint}" if self.hint else task.prompt
        messages = (*task.messages_before, *user(asked))
        return Request(
            messages, self.sampling, self.max_new_tokens, images=task.images, schema=self.schema
        )

    def context(self, seed: int, call: int | str) -> tuple[Message, ...]:
        """Return the system message of a call; () without system prompts.

        A given prompt has its text in place of the number, so that it keeps the message if it is
        moved.
        """
        if not self.system:
            return ()
        weights = [one.weight for one in self.system]
        (chosen,) = draw_of(seed, f"{call}/system").choices(self.system, weights)
        return ({"role": "system", "content": chosen.text},)


class TaskGenerator(ABC):
    """Base of all generators.  `num_calls` is None if the number of calls has no limit."""

    num_calls: int | None = None

    @property
    @abstractmethod
    def at_most(self) -> Cost | None:
        """Upper bounds for one call; None if nobody knows them."""

    @abstractmethod
    def call(self, number: int, machine: Sequence[Task]) -> Call:
        """Return the exchange of call `number`.

        `machine` are the generated tasks that were kept in earlier rounds.
        """


def why_no_question(reply: Reply) -> str:
    """Return why a reply is not a question that can be answered, or "" if it is one."""
    # Half an instruction may still look whole, so it is not answered.
    if reply.refused or reply.truncated:
        return reply.refused or "endless instruction"
    return "" if reply.text.strip() else "empty instruction"


def answered(tasks: list[Task], answering: Answering | None) -> Call:
    """Return the tasks with the teacher's answers; refused requests are counted as dropped.

    Without `answering` they stay questions alone.
    """
    if answering is None:
        return Parsed([replace(task, is_answered=False) for task in tasks])
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
    dropped = Counter(reply.refused for reply in replies if reply.refused)
    if not answering.schema:
        return Parsed(made, dropped)
    plain = [replace(task, output=unfenced(task.output)) for task in made]
    fitting = [t for t in plain if t.truncated or fits_schema(t.output, answering.schema)]
    return Parsed(fitting, +(dropped + Counter({NO_JSON: len(made) - len(fitting)})))


def fits_schema(text: str, schema: str) -> bool:
    """Whether a text is JSON that a JSON schema allows."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), json.loads(schema))
    except Exception:  # no JSON, not what the schema allows, or a reference that leads nowhere
        return False
    return True


def require(seeds: Sequence[Task], examples: int) -> None:
    """Raise DataError if there are fewer seed tasks than one prompt needs."""
    if len(seeds) < examples:
        raise DataError(
            f"'seed_tasks' has {len(seeds)} tasks, but each prompt needs {examples}. Add seed "
            "tasks, or lower generator.examples."
        )


def draw_of(seed: int, number: int | str) -> random.Random:
    """Return the random generator of one call."""
    # Seeded with a string, which Python hashes with SHA-512: the same on every machine and run.
    return random.Random(f"{seed}/{number}")
