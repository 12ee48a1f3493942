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
from llmdistill.publish.facts import Facts
from llmdistill.recipe import Recipe
from llmdistill.recipe.reading import load_recipe


@dataclass(frozen=True)
class Run:
    """What a run folder holds.  A run that is not finished has no `facts`, and fewer figures."""

    name: str
    recipe: Recipe
    log: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: dict[str, Figures]
    answers: list[Answers]
    looked_at: list[dict[str, Any]]
    facts: Facts | None

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
        )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders.  Runs of equal names get the name of their parent folder, too."""
    names = [folder.resolve().name for folder in folders]
    told = [
        f"{folder.resolve().parent.name}/{name}" if names.count(name) > 1 else name
        for folder, name in zip(folders, names, strict=True)
    ]
    return [Run.read(folder, name) for folder, name in zip(folders, told, strict=True)]


def _before(folder: Path) -> dict[str, Figures]:
    """Return what a run that is not finished has measured before training."""
    try:
        found = json.loads((folder / run_folder.BEFORE).read_text(encoding="utf-8"))
        return {"before": Figures(**found["figures"])}
    except (OSError, ValueError, KeyError, TypeError):  # nothing measured, or by another version
        return {}
