"""How the runs of a recipe begin: new, or from what an earlier start has left in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmdistill import recipe as recipes
from llmdistill import run_folder
from llmdistill.errors import CheckpointError, RecipeError
from llmdistill.recipe import Recipe

AUTO, NEVER = "auto", "never"


class Start(NamedTuple):
    """How a run begins; `runs` is False for one that is finished and need not be repeated.

    `checkpoint` is the one to resume from; None is the newest one.
    """

    resume: bool = False
    overwrite: bool = False
    runs: bool = True
    checkpoint: Path | None = None

    def check(self, stage: Recipe) -> None:
        """Raise CheckpointError if the run's folder cannot be used in this way."""
        folder = Path(stage.output)
        run_folder.check(folder, resume=self.resume, overwrite=self.overwrite)
        if self.resume:
            recipes.require_same(folder / run_folder.RECORD, stage)
        if self.checkpoint is not None and not self.checkpoint.is_dir():
            raise CheckpointError(f"{self.checkpoint} is no checkpoint, because it is no folder")


def starts_of(
    stages: Sequence[Recipe], *, resume: str | Path = AUTO, overwrite: bool = False
) -> list[Start]:
    """Return how each run of a recipe begins.

    If an earlier run of the recipe is resumed, later ones have nothing to resume: what is in their
    folders belongs to an earlier start, and is replaced.  Raises CheckpointError if a folder cannot
    be used in this way, or has a run with another recipe.
    """
    starts = _planned(stages, resume, overwrite=overwrite)
    for stage, start in zip(stages, starts, strict=True):
        start.check(stage)
    for place, (stage, start) in enumerate(zip(stages, starts, strict=True), start=1):
        if start.runs or not asks_for_more(stage):
            continue
        if place < len(stages):
            raise CheckpointError(
                f"the run in {stage.output} is finished, and others learn from it, so it cannot be "
                "continued as the recipe asks now. Pass overwrite to start all of them again."
            )
        starts[-1] = start._replace(runs=True)
    return starts


def _planned(stages: Sequence[Recipe], resume: str | Path, *, overwrite: bool) -> list[Start]:
    """Return how each run would begin if its folder allows it."""
    if isinstance(resume, bool):
        raise RecipeError(f"resume: {resume} is not 'auto', 'never' or a checkpoint's path")
    named = None if resume in (AUTO, NEVER) else Path(resume)
    if overwrite and named is not None:
        raise CheckpointError(
            f"resume={named} continues the run and overwrite replaces it. Choose one."
        )
    if overwrite or resume == NEVER:
        return [Start(overwrite=overwrite)] * len(stages)
    starts: list[Start] = []
    for stage in stages:
        folder = Path(stage.output)
        if not (folder / run_folder.RECORD).is_file() or not run_folder.is_used(folder):
            starts.append(Start())
        elif any(one.runs for one in starts):
            starts.append(Start(overwrite=any(one.resume for one in starts)))
        elif named is not None and named.resolve().is_relative_to(folder.resolve()):
            starts.append(Start(resume=True, checkpoint=named))
        else:
            starts.append(Start(resume=True, runs=not _has_results(folder)))
    if named is not None and not any(one.checkpoint for one in starts):
        raise CheckpointError(
            f"{named} is in the folder of no run of this recipe that can continue: "
            f"{', '.join(stage.output for stage in stages)}. Set output to the folder that it is in"
        )
    return starts


def asks_for_more(stage: Recipe) -> bool:
    """Whether the recipe of a finished run asks for other results than it has.

    Raises CheckpointError if it does, and there is no checkpoint to go on from.
    """
    folder = Path(stage.output)
    if recipes.same_results(folder / run_folder.RECORD, stage):
        return False
    if not any(folder.glob("checkpoints/checkpoint-*/manifest.json")):
        raise CheckpointError(
            f"the run in {folder} is finished, and it has no checkpoint to go on from. Pass "
            "overwrite to start again, or choose another folder (output=...)."
        )
    return True


def _has_results(folder: Path) -> bool:
    student = folder / "student"
    return (student / "README.md").is_file() and any(student.glob("*.safetensors"))
