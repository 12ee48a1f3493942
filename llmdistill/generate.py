"""`generate(recipe)`: teacher, generator, filters, pipeline, data set."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from llmdistill import recipe as recipes
from llmdistill.errors import CheckpointError
from llmdistill.instruct import build_filters, build_generator, read_tasks
from llmdistill.instruct.dataset import write_splits
from llmdistill.instruct.pipeline import Counts, Pipeline, Settings, Writer
from llmdistill.instruct.requests import Request
from llmdistill.instruct.writers import LocalWriter, RemoteWriter
from llmdistill.models.load import load_tokenizer
from llmdistill.publish.data_card import Outcome, data_card
from llmdistill.teachers import build_teacher
from llmdistill.teachers.remote import RemoteTeacher

logger = logging.getLogger("llmdistill")


@dataclass(frozen=True)
class Generated:
    """What a run left: its folder, the rows of each split, and what became of the tasks."""

    folder: Path
    sizes: dict[str, int]
    counts: Counts


def generate(
    recipe: recipes.GenerationRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Counts, float], None] = lambda counts, seconds: None,
) -> Generated:
    """Runs a recipe to its target.

    A folder that is there already is only used with `resume` (go on where it stopped) or
    `overwrite` (delete it first); else CheckpointError.
    """
    folder = Path(recipe.output)
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            _prepare(folder, recipe, resume=resume, overwrite=overwrite)
    seeds = read_tasks(recipe.seeds)
    writer = build_writer(recipe)
    about = {
        "generator": recipe.generator.kind,
        "teacher": recipe.teacher.model,
        "revision": recipe.teacher.revision or "",
        "sampling": json.dumps(_samplings(recipe), sort_keys=True),
        "seed": recipe.seed,
    }
    pipeline = Pipeline(
        build_generator(recipe, seeds),
        writer,
        build_filters(recipe, seeds),
        Settings(folder, recipe.target, recipe.round_size, about),
    )
    pipeline.run(progress)
    sizes: dict[str, int] = {}
    if PartialState().is_main_process:
        sizes = write_splits(folder, columns=recipe.columns, held_back=recipe.held_back)
        card = data_card(recipe, Outcome(sizes, pipeline.counts.dropped))
        (folder / "README.md").write_text(card, encoding="utf-8")
    PartialState().wait_for_everyone()
    return Generated(folder, sizes, pipeline.counts)


def build_writer(recipe: recipes.GenerationRecipe) -> Writer:
    """Who replies."""
    answer = recipe.teacher
    if isinstance(answer, recipes.RemoteTeacherRecipe):
        options = answer.model_dump(exclude={"kind", "revision", "tokenizer"})
        known = answer.tokenizer and load_tokenizer(answer.tokenizer)
        return RemoteWriter(RemoteTeacher(tokenizer=known or None, **options), seed=recipe.seed)
    teacher = build_teacher(answer)
    return LocalWriter(teacher, seed=recipe.seed, batch_size=recipe.batch_size)


def first_request(recipe: recipes.GenerationRecipe) -> Request:
    """What the teacher will be asked first."""
    generator = build_generator(recipe, read_tasks(recipe.seeds))
    return next(generator.call(0, []))[0]


def _samplings(recipe: recipes.GenerationRecipe) -> dict[str, object]:
    given = recipe.generator.model_dump(mode="json")
    return {name: value for name, value in given.items() if name.endswith("sampling")}


def _prepare(
    folder: Path, recipe: recipes.GenerationRecipe, *, resume: bool, overwrite: bool
) -> None:
    """Makes the folder, or raises CheckpointError: nothing is overwritten without being asked to,
    and a run goes on as it was begun.
    """
    record = folder / "recipe.yaml"
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used and overwrite and not record.is_file():
        raise CheckpointError(f"--overwrite: {folder} holds no data set, and is left alone")
    if used and not (resume or overwrite):
        raise CheckpointError(
            f"{folder} is not empty. Go on with it (--resume), replace it (--overwrite), or choose "
            "another folder (output=...)."
        )
    if used and overwrite:
        shutil.rmtree(folder)
    elif resume and record.is_file():
        begun = recipes.load_generation(record)
        if begun.model_copy(update={"target": recipe.target}) != recipe:
            raise CheckpointError(
                f"--resume: {record} says otherwise than this recipe; only 'target' may change"
            )
    elif resume and used:
        raise CheckpointError(f"--resume: {folder} holds no data set")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(recipes.dump(recipe), encoding="utf-8")
