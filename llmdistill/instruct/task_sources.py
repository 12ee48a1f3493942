"""Tasks read from sources of rows: seed tasks, prompts and pools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmdistill.data.formats import form_of, to_examples
from llmdistill.data.sources import read
from llmdistill.errors import DataError, RecipeError
from llmdistill.instruct.tasks import Task
from llmdistill.recipe import SourceRecipe
from llmdistill.teachers.multimodal import image_files


def read_tasks(sources: Iterable[SourceRecipe], *, images: str | None = None) -> list[Task]:
    """Return the rows of sources as tasks: the user's turn, and the answer if there is one.

    `images` is the column with the paths of a row's images, if the teacher sees them.  Raises
    RecipeError for a source with a weight, and DataError for a row that is malformed or has more
    than one turn.
    """
    sources = list(sources)
    if weighted := [source for source in sources if source.weight != 1]:
        raise RecipeError(
            f"'{weighted[0].source}' has weight {weighted[0].weight}, but weights apply only to "
            "training data: here each row is read once. Remove 'weight'."
        )
    return [
        _task(row, place, source.format, images)
        for source in sources
        for place, row in read(source.source, columns=source.columns, add=source.add)
    ]


def _task(row: Any, place: str, form: str, images: str | None) -> Task:
    # `read` yields the error of a malformed row in its place; tasks have no `on_bad_row: skip`.
    if isinstance(row, DataError):
        raise row
    example = to_examples(row, place, form=form)[0]
    if len(example.prompt) != 1:
        raise DataError(
            f"{place}: a task must have a single user turn as its prompt, got "
            f"{len(example.prompt)} messages. Use rows of one turn."
        )
    files = () if images is None else tuple(image_files(row.get(images), place, images))
    # Tables (CSV) have only text, so "False" must be read as a word.
    classifies = str(row.get("is_classification", False)).strip().lower() in ("true", "yes", "1")
    if form_of(row, place, form) == "alpaca":
        # From the row, not the example, which joins instruction and input into one text.
        instruction, given, output = (
            str(row.get(key) or "") for key in ("instruction", "input", "output")
        )
        reference = example.response
        return Task(
            instruction, given, output, reference=reference, classifies=classifies, images=files
        )
    text = example.prompt[0]["content"]
    return Task(text, "", example.response or "", reference=example.response, images=files)
