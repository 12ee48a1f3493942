"""Reading tasks out of a teacher's free text: strict, so that no half task passes for one.

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
# A separate line before an item; answers have headings that begin alike.
_BETWEEN = re.compile(
    rf"^{BETWEEN}[ \t]*\n?(?=[ \t]*\d+[.)]?\s*(?:{'|'.join(FIELDS)}):)", re.MULTILINE
)


class Parsed(NamedTuple):
    """The tasks of a text, and how many of its items were none, by reason."""

    tasks: list[Task]
    dropped: Mapping[str, int] = {}


def write_task(number: int, task: Task) -> str:
    """A task as an item of the list."""
    return (
        f"{BETWEEN}\n{number}. Instruction: {task.instruction}\n{number}. Input:\n"
        f"{task.input or NO_INPUT}\n{number}. Output:\n{task.output}\n"
    )


def parse_tasks(text: str, *, truncated: bool = False) -> Parsed:
    """The items of a list, in order.  Where the text was cut off, its last item is dropped.

    An item is a task if it has each field once, in order, and an instruction.
    """
    items = [item for item in _BETWEEN.split(text) if item.strip(" \t\n#")]
    dropped = Counter({TRUNCATED: 1} if truncated and items else {})
    found = [_task(item) for item in (items[:-1] if truncated else items)]
    tasks = [task for task in found if task is not None]
    return Parsed(tasks, dropped + Counter({UNPARSABLE: len(found) - len(tasks)}))


def parse_question(text: str) -> Task | None:
    """The first item of a text as far as it goes: an instruction, an input if there is one."""
    item = next(item for item in _BETWEEN.split(text) if item.strip(" \t\n#"))
    _, *parts = _FIELD.split(item)
    fields: dict[str, str] = {}
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        fields[name] = fields.get(name) or _without_mark(value)
    return _made(fields.get("Instruction", ""), fields.get("Input", ""), "")


def _without_mark(value: str) -> str:
    """A field without the mark that would begin another item."""
    return value.strip().removesuffix(BETWEEN).strip()


def _task(item: str) -> Task | None:
    _, *parts = _FIELD.split(item)
    names, values = parts[::2], [_without_mark(value) for value in parts[1::2]]
    return _made(*values) if tuple(names) == FIELDS else None


def _made(instruction: str, given: str, output: str) -> Task | None:
    given = "" if given.lower() == NO_INPUT else given
    return Task(instruction, given, output) if instruction else None
