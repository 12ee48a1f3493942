"""`generate(recipe)`: teacher, generator, filters, pipeline, data set."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from llmdistill import recipe as recipes
from llmdistill.data.render import open_user_turn
from llmdistill.errors import CheckpointError, DataError, RecipeError
from llmdistill.instruct import build_filters, build_generator, read_tasks
from llmdistill.instruct.dataset import write_splits
from llmdistill.instruct.generators import TaskGenerator
from llmdistill.instruct.lion import Pools
from llmdistill.instruct.pipeline import Pipeline, Settings, TaskCounts
from llmdistill.instruct.pools import tell_apart
from llmdistill.instruct.records import replace_text
from llmdistill.instruct.requests import Reply, Request
from llmdistill.instruct.responders import LocalResponder, RemoteResponder
from llmdistill.models.load import load_tokenizer, revision_of
from llmdistill.publish.data_card import Outcome, data_card
from llmdistill.teachers.build import build_teacher
from llmdistill.teachers.remote import RemoteTeacher

RANKS_WAIT = timedelta(hours=6)
TRANSPORT = ("url", "key_from", "concurrency", "timeout", "retries", "per_minute", "license")


@dataclass(frozen=True)
class Generated:
    """What a run left: its folder, the rows of each split, and what became of the tasks."""

    folder: Path
    sizes: dict[str, int]
    counts: TaskCounts


def generate(
    recipe: recipes.GenerationRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[TaskCounts, float], None] = lambda counts, seconds: None,
) -> Generated:
    """Runs a recipe to its target.

    A folder that is there already is only used with `resume` (go on where it stopped) or
    `overwrite` (delete it first); else CheckpointError.
    """
    folder = Path(recipe.output)
    _ranks()
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            _prepare(folder, recipe, resume=resume, overwrite=overwrite)
    seeds = read_tasks(recipe.seeds)
    responder = build_responder(recipe, folder)
    about: dict[str, Any] = {
        "generator": recipe.generator.kind,
        "teacher": recipe.teacher.model,
        "revision": _revision(recipe, responder),
        "sampling": json.dumps(_samplings(recipe), sort_keys=True),
        "seed": recipe.seed,
    }
    pipeline = Pipeline(
        build_generator(recipe, seeds, tell_apart(recipe, responder, folder)),
        responder,
        build_filters(recipe, seeds),
        Settings(folder, recipe.target, recipe.round_size, about),
    )
    pipeline.run(progress)
    sizes: dict[str, int] = {}
    if PartialState().is_main_process:
        sizes = write_splits(folder, columns=recipe.columns, held_back=recipe.held_back)
        counts = pipeline.counts
        card = data_card(recipe, Outcome(sizes, counts.dropped, counts.variants, about["revision"]))
        replace_text(folder / "README.md", card)
        if isinstance(responder, RemoteResponder):
            responder.forget()
    PartialState().wait_for_everyone()
    return Generated(folder, sizes, pipeline.counts)


def _ranks() -> None:
    """Ranks that know of each other, on a CPU too; they wait as long as a server may take."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=RANKS_WAIT)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise RecipeError(
            f"{os.environ['WORLD_SIZE']} processes were started, but they do not form one group: "
            "each would write the whole data set"
        )


def build_responder(
    recipe: recipes.GenerationRecipe, folder: Path | None = None
) -> LocalResponder | RemoteResponder:
    """Who replies; what a server said is recorded in `folder` as it comes."""
    answer, seed = recipe.teacher, recipe.seed
    common: dict[str, Any] = {
        "scored": recipe.is_scored,
        "chat_template_kwargs": recipe.chat_template_kwargs,
    }
    if isinstance(answer, recipes.RemoteTeacherRecipe):
        options = answer.model_dump(exclude={"kind", "revision", "tokenizer", "license"})
        if answer.per_minute is not None:
            options["per_minute"] = answer.per_minute / PartialState().num_processes
        known = load_tokenizer(answer.tokenizer) if answer.tokenizer else None
        remote = RemoteTeacher(tokenizer=known, **common, **options)
        return RemoteResponder(remote, seed=seed, record=folder)
    return LocalResponder(build_teacher(answer), seed=seed, batch_size=recipe.batch_size, **common)


def _revision(recipe: recipes.GenerationRecipe, responder: LocalResponder | RemoteResponder) -> str:
    """The teacher's, as exactly as it is known."""
    found = ""
    if isinstance(responder, LocalResponder):
        found = revision_of(responder.teacher.model, recipe.teacher.model)
    return found or recipe.teacher.revision or ""


def planned(recipe: recipes.GenerationRecipe) -> TaskGenerator:
    """The generator, before any model is loaded; which tasks are hard is not known yet."""
    pools = None
    if isinstance(recipe.generator, recipes.LionRecipe):
        pools = Pools(*[read_tasks(recipe.generator.pool)] * 2)
    return build_generator(recipe, read_tasks(recipe.seeds), pools)


def filled(recipe: recipes.GenerationRecipe, generator: TaskGenerator) -> list[str]:
    """What the teacher will be asked first, as text, and what then, where that asks for more."""
    calls = generator.num_calls if generator.num_calls is not None else 1
    for call in (generator.call(number, []) for number in range(calls)):
        texts: list[str] = []
        with contextlib.suppress(StopIteration):
            requests = next(call)
            while True:
                texts.append(_filled(recipe, requests[0]))
                requests = call.send([Reply("(what it wrote)") for _ in requests])
        if texts:
            return texts
    raise DataError("there is nothing to ask: no row of generator.prompts can be used")


def _filled(recipe: recipes.GenerationRecipe, request: Request) -> str:
    """A request as text; a user's turn as the template opens it.  A server is not told how its
    reply is to begin.
    """
    teacher = recipe.teacher
    if request.turn == "user":
        if isinstance(teacher, recipes.RemoteTeacherRecipe):
            assert teacher.tokenizer is not None  # such a recipe is refused without one
            tokenizer = load_tokenizer(teacher.tokenizer)
        else:
            tokenizer = load_tokenizer(teacher.model, revision=teacher.revision)
        ids = open_user_turn(tokenizer, recipe.chat_template_kwargs)
        return f"{tokenizer.decode(ids)}..."
    asked = [f"[{message['role']}]\n{message['content']}" for message in request.messages]
    start = "" if isinstance(teacher, recipes.RemoteTeacherRecipe) else request.start
    return "\n".join([*asked, f"[{request.turn}]\n{start}..."])


def _samplings(recipe: recipes.GenerationRecipe) -> dict[str, object]:
    """How replies are drawn: the sampling of what is asked first, and how it is answered."""
    given = recipe.generator.model_dump(mode="json")
    drawn = {"sampling": given.get("sampling")}
    drawn["answer"] = (given.get("answer") or {}).get("sampling")
    return {name: how for name, how in drawn.items() if how is not None}


def _prepare(
    folder: Path, recipe: recipes.GenerationRecipe, *, resume: bool, overwrite: bool
) -> None:
    """Makes the folder, or raises CheckpointError: nothing is overwritten without being asked to,
    and a run goes on as it was begun.
    """
    record = folder / "recipe.yaml"
    # A file that was being written when the run was killed is nothing yet.
    there = [file for file in folder.iterdir() if file.suffix != ".new"] if folder.is_dir() else []
    if there == [record]:  # a start that failed before a word was said
        there = []
    used = bool(there) or (folder.exists() and not folder.is_dir())
    if used and overwrite and not record.is_file():
        raise CheckpointError(f"--overwrite: {folder} holds no data set, and is left alone")
    if used and not (resume or overwrite):
        raise CheckpointError(
            f"{folder} is not empty. Go on with it (--resume), replace it (--overwrite), or choose "
            "another folder (output=...)."
        )
    if used and overwrite:
        for file in sorted(there, key=lambda file: file == record):  # the record last of all
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif used and resume and record.is_file():
        before, now = _what_counts(recipes.load_generation(record)), _what_counts(recipe)
        if changed := [key for key in now if before.get(key) != now[key]]:
            key = changed[0]
            raise CheckpointError(
                f"--resume: '{key}' was {before.get(key)} in {record} and is {now[key]} now; only "
                "'target', 'columns', 'held_back' and how a server is reached may change"
            )
    elif resume and used:
        raise CheckpointError(f"--resume: {folder} holds no data set")
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(record, recipes.dump(recipe))


def _what_counts(recipe: recipes.GenerationRecipe) -> dict[str, object]:
    """What the rows depend on."""
    given = recipe.model_dump(exclude={"target", "columns", "held_back", "output"})
    given["teacher"] = {k: v for k, v in given["teacher"].items() if k not in TRANSPORT}
    return given
