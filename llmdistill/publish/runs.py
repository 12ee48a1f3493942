"""A run folder, read for its report: everything that the run has written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill import run_folder
from llmdistill.errors import CheckpointError
from llmdistill.evaluation.measure import Figures
from llmdistill.evaluation.results import Answers, read_results
from llmdistill.publish.facts import FACTS, Facts
from llmdistill.recipe import Recipe
from llmdistill.recipe.reading import load_recipe


@dataclass(frozen=True)
class Run:
    """What a run folder holds.  A run that is not finished has fewer figures."""

    name: str
    recipe: Recipe
    log: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: dict[str, Figures]
    answers: list[Answers]
    looked_at: list[dict[str, Any]]
    facts: Facts | None
    is_finished: bool

    @classmethod
    def read(cls, folder: Path, name: str) -> Run:
        """Read a run folder.  Raises CheckpointError if it has no run, or none that can be read."""
        record = folder / run_folder.RECORD
        if not record.is_file():
            raise CheckpointError(
                f"{folder} has no run: there is no {run_folder.RECORD} in it. Name the run folder, "
                "which is `output` of the recipe."
            )
        evaluation, answers = read_results(folder)
        return cls(
            name=name,
            recipe=load_recipe(record),
            log=run_folder.read_lines(folder / run_folder.METRICS),
            samples=run_folder.read_lines(folder / run_folder.SAMPLES),
            evaluation=evaluation or _before(folder),
            answers=answers,
            looked_at=run_folder.read_lines(folder / run_folder.POSITIONS),
            facts=Facts.read(folder),
            is_finished=any((folder / name).is_file() for name in (FACTS, "student/README.md")),
        )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders.  Each is called by as much of the end of its path as tells them apart."""
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len({*names, "teacher"}) == len(names) + 1:  # a column of the table has this name
            break
    return [Run.read(path, name) for path, name in zip(paths, names, strict=True)]


def _before(folder: Path) -> dict[str, Figures]:
    """Return what a run that is not finished has measured before training."""
    try:
        found = json.loads((folder / run_folder.BEFORE).read_text(encoding="utf-8"))
        return {"before": Figures(**found["figures"])}
    except (OSError, ValueError, KeyError, TypeError):  # nothing measured, or by another version
        return {}
