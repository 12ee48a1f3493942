"""Read tasks from a list that a teacher wrote.  Incomplete items are dropped.

Each item has this form:

###
4. Instruction: ...
4. Input:
<noinput>
4. Output:
...
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from llmdistill.instruct.tasks import Task

BETWEEN = "###"
NO_INPUT = "<noinput>"
UNPARSABLE, TRUNCATED = "unparsable", "truncated"
FIELDS = ("Instruction", "Input", "Output")
_FIELD = re.compile(rf"^[ \t]*\d+[.)]?\s*({'|'.join(FIELDS)}):[ \t]*", re.MULTILINE)
# Only a "###" that is followed by a field starts an item: answers may contain "###" as headings of
# their own, which must stay in them.
_BETWEEN = re.compile(
    rf"^{BETWEEN}[ \t]*\n?(?=[ \t]*\d+[.)]?\s*(?:{'|'.join(FIELDS)}):)", re.MULTILINE
)


class Parsed(NamedTuple):
    """Tasks of a text, and the number of items that were dropped, by reason."""

    tasks: list[Task]
    dropped: Mapping[str, int] = {}


def write_task(number: int, task: Task) -> str:
    """Return a task as item `number` of a list."""
    return (
        f"{BETWEEN}\n{number}. Instruction: {task.instruction}\n{number}. Input:\n"
        f"{task.input or NO_INPUT}\n{number}. Output:\n{task.output}\n"
    )


def parse_tasks(text: str, *, truncated: bool = False) -> Parsed:
    """Return the tasks of a list, in order.

    An item is a task if it has each field once, in the order of `FIELDS`, and its instruction is
    not empty.  If the text is `truncated`, the last item is dropped as incomplete.
    """
    items = [item for item in _BETWEEN.split(text) if item.strip(" \t\n#")]
    dropped = Counter({TRUNCATED: 1} if truncated and items else {})
    found = [_task(item) for item in (items[:-1] if truncated else items)]
    tasks = [task for task in found if task is not None]
    return Parsed(tasks, dropped + Counter({UNPARSABLE: len(found) - len(tasks)}))


def parse_question(text: str) -> Task | None:
    """Return the instruction and input of the first item of a text, without an output.

    Returns None if there is no instruction.
    """
    item = next(item for item in _BETWEEN.split(text) if item.strip(" \t\n#"))
    _, *parts = _FIELD.split(item)
    fields: dict[str, str] = {}
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        # The first non-empty value counts: some teachers repeat the field that they continue.
        fields[name] = fields.get(name) or _without_mark(value)
    return _made(fields.get("Instruction", ""), fields.get("Input", ""), "")


def _without_mark(value: str) -> str:
    """Return a field without the "###" after it that begins the next item."""
    return value.strip().removesuffix(BETWEEN).strip()


def _task(item: str) -> Task | None:
    """Return an item as a task, or None if a field is missing, repeated or out of order."""
    _, *parts = _FIELD.split(item)
    names, values = parts[::2], [_without_mark(value) for value in parts[1::2]]
    return _made(*values) if tuple(names) == FIELDS else None


def _made(instruction: str, given: str, output: str) -> Task | None:
    """Return a task, or None without an instruction; `NO_INPUT` becomes an empty input."""
    given = "" if given.lower() == NO_INPUT else given
    return Task(instruction, given, output) if instruction else None
