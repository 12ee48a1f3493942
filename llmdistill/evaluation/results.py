"""What a run measured, as files of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llmdistill.errors import CheckpointError
from llmdistill.evaluation.measure import Figures
from llmdistill.run_folder import ANSWERS, FIGURES, read_lines, write_lines


@dataclass(frozen=True)
class Answers:
    """One held-out prompt with the responses of the teacher and of the student before and after."""

    prompt: str
    """The user's last message, without the template's control tokens."""
    teacher: str
    before: str
    after: str


def write_results(folder: Path, figures: Mapping[str, Figures], answers: list[Answers]) -> None:
    """Write the figures of each model, and the responses side by side."""
    text = json.dumps({name: asdict(value) for name, value in figures.items()}, indent=2)
    (folder / FIGURES).write_text(text + "\n", encoding="utf-8")
    write_lines(folder / ANSWERS, map(asdict, answers))


def read_results(folder: Path) -> tuple[dict[str, Figures], list[Answers]]:
    """Return what `write_results` wrote; nothing if the run has measured nothing.

    Raises CheckpointError if the files are damaged, or were written by another version.
    """
    file = folder / FIGURES
    if not file.is_file():
        return {}, []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        figures = {name: Figures(**values) for name, values in found.items()}
        return figures, [Answers(**row) for row in read_lines(folder / ANSWERS)]
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} or {ANSWERS} next to it is damaged, or of another version: {error}. Measure "
            "the student again with `llmdistill evaluate`, or delete both files."
        ) from error
