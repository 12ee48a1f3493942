"""Tasks read from sources of rows: seed tasks, prompts and pools."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from llmdistill.data.formats import alpaca_texts, form_of, to_examples, unread
from llmdistill.data.sources import read
from llmdistill.errors import DataError, RecipeError
from llmdistill.instruct.tasks import Task
from llmdistill.recipe import SourceRecipe
from llmdistill.teachers.multimodal import image_files

logger = logging.getLogger("llmdistill")


def read_tasks(
    sources: Iterable[SourceRecipe],
    *,
    images: str | None = None,
    on_bad_row: str = "stop",
    takes_context: bool = False,
    is_sent: bool = False,
) -> list[Task]:
    """Return the rows of sources as tasks: the user's turn, and the answer if there is one.

    `images` is the column with the paths of a row's images, if the teacher sees them.  With
    `on_bad_row` skip, malformed rows are skipped and counted in a warning.  `takes_context` allows
    messages before the user's turn.  `is_sent` leaves it to a server whether it takes a text.
    Raises RecipeError for a source with a weight, and DataError for a row that is malformed.
    """
    sources = list(sources)
    if weighted := [source for source in sources if source.weight != 1]:
        raise RecipeError(
            f"'{weighted[0].source}' has weight {weighted[0].weight}, but weights apply only to "
            "training data: here each row is read once. Remove 'weight'."
        )
    tasks: list[Task] = []
    bad: list[DataError] = []
    left: Counter[str] = Counter()
    for source in sources:
        for place, row in read(source.source, columns=source.columns, add=source.add):
            try:
                task = _task(row, place, source.format, images)
                _check(task, place, takes_context=takes_context, is_sent=is_sent)
            except DataError as error:
                if on_bad_row == "stop":
                    raise DataError(f"{error} Set on_bad_row: skip to skip such rows.") from error
                bad.append(error)
            else:
                tasks.append(task)
                left.update(unread(row, form_of(row, place, source.format)))
    left.pop(images or "", None)
    if left:
        logger.warning("fields of prompts that nothing reads: %s", ", ".join(left))
    if bad:
        logger.warning("%d malformed rows are skipped, the first one: %s", len(bad), bad[0])
    return tasks


def _check(task: Task, place: str, *, takes_context: bool, is_sent: bool) -> None:
    """Raise DataError for a task that the generator or the teacher cannot use."""
    turns = [one["role"] for one in task.context if one["role"] != "system"]
    pairs = ["user", "assistant"] * (len(turns) // 2)
    if takes_context and (turns != pairs or "system" in [m["role"] for m in task.context[1:]]):
        raise DataError(
            f"{place}: the messages before the question must be an optional system message, and "
            f"then questions with answers, got {', '.join(m['role'] for m in task.context)}."
        )
    if task.context and not takes_context:
        raise DataError(
            f"{place}: a task must have a single user turn as its prompt, got "
            f"{len(task.context) + 1} messages. Use rows of one turn."
        )
    try:
        # A lone surrogate is half a character, and no tokenizer can read it.
        "" if is_sent else f"{task.prompt}{task.output}{task.context}".encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: the text is not valid Unicode: {error}.") from error


def _task(row: Any, place: str, form: str, images: str | None) -> Task:
    if isinstance(row, DataError):  # `read` yields the error of a malformed row in its place
        raise row
    found = to_examples(row, place, form=form)
    if not found:
        raise DataError(f"{place}: 'weight' or 'train' excludes the answer of the row.")
    (example,) = found
    speaks = any(m["role"] == "tool" or m.get("tool_calls") for m in example.prompt)
    if example.tools or speaks or example.more.get("tool_calls"):
        raise DataError(f"{place}: generate does not use tools. Drop the row.")
    files = () if images is None else tuple(image_files(row.get(images), place, images))
    # Tables (CSV) have only text, so "False" must be read as a word.
    label = row.get("is_classification", ...)
    classifies = None if label is ... else str(label).strip().lower() in ("true", "yes", "1")
    *context, asked = example.prompt or ({"content": ""},)
    common: dict[str, Any] = {
        "reference": example.response, "images": files, "context": tuple(context),
    }  # fmt: skip
    if form_of(row, place, form) == "alpaca":
        # From the row, not the example, which joins instruction and input into one text.
        instruction, given, output = (text or "" for text in alpaca_texts(row, place))
        return Task(instruction, given, output, classifies=classifies, **common)
    if not example.prompt:
        raise DataError(f"{place}: plain text has no question. Use rows with a prompt.")
    return Task(asked["content"], "", example.response or "", **common)
