"""`generate(recipe)`: teacher, generator, filters, pipeline, data set."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from llmdistill import recipe as recipes
from llmdistill.data.render import open_user_turn
from llmdistill.errors import CheckpointError, DataError, RecipeError
from llmdistill.instruct.build import build_filters, build_generator, build_responder
from llmdistill.instruct.dataset import write_splits
from llmdistill.instruct.generators import TaskGenerator
from llmdistill.instruct.lion import Pools
from llmdistill.instruct.pipeline import Pipeline, Settings, TaskCounts
from llmdistill.instruct.pools import tell_apart
from llmdistill.instruct.records import replace_text
from llmdistill.instruct.requests import Reply, Request
from llmdistill.instruct.responders import LocalResponder, RemoteResponder
from llmdistill.instruct.task_sources import read_tasks
from llmdistill.models.load import load_tokenizer, revision_of
from llmdistill.publish.data_card import Outcome, data_card

RANKS_WAIT = timedelta(hours=6)


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
    seed_tasks = read_tasks(recipe.seed_tasks)
    responder = build_responder(recipe, folder)
    about: dict[str, Any] = {
        "generator": recipe.generator.kind,
        "teacher": recipe.teacher.model,
        "revision": _revision(recipe, responder),
        "sampling": _samplings(recipe),
        "seed": recipe.seed,
    }
    pipeline = Pipeline(
        build_generator(recipe, seed_tasks, partial(tell_apart, recipe, responder, folder)),
        responder,
        build_filters(recipe, seed_tasks),
        Settings(folder, recipe.target, recipe.round_size, about),
    )
    pipeline.run(progress)
    sizes: dict[str, int] = {}
    if PartialState().is_main_process:
        sizes = write_splits(folder, format=recipe.format, test_share=recipe.test_share)
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


def _revision(recipe: recipes.GenerationRecipe, responder: LocalResponder | RemoteResponder) -> str:
    """The teacher's, as exactly as it is known."""
    found = ""
    if isinstance(responder, LocalResponder):
        found = revision_of(responder.teacher.model, recipe.teacher.model)
    return found or recipe.teacher.revision or ""


def planned(recipe: recipes.GenerationRecipe) -> TaskGenerator:
    """The generator, before any model is loaded; which tasks are hard is not known yet."""

    def unsplit(section: recipes.LionRecipe) -> Pools:
        tasks = read_tasks(section.pool)
        return Pools(hard=tasks, easy=tasks)

    return build_generator(recipe, read_tasks(recipe.seed_tasks), unsplit)


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
        assert teacher.tokenizer_source is not None  # such a recipe is refused without one
        name, revision = teacher.tokenizer_source
        tokenizer = load_tokenizer(name, revision=revision)
        ids = open_user_turn(tokenizer, recipe.chat_template_kwargs)
        return f"{tokenizer.decode(ids)}..."
    asked = [f"[{message['role']}]\n{message['content']}" for message in request.messages]
    start = "" if teacher.is_remote else request.start
    return "\n".join([*asked, f"[{request.turn}]\n{start}..."])


def _samplings(recipe: recipes.GenerationRecipe) -> str:
    """How replies are drawn, as JSON."""
    samplings = recipe.generator.samplings
    drawn = {name: sampling.model_dump(mode="json") for name, sampling in samplings.items()}
    return json.dumps(drawn, sort_keys=True)


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
        before, now = recipes.load_generation(record).unchanging(), recipe.unchanging()
        if changed := [key for key in now if before.get(key) != now[key]]:
            key = changed[0]
            raise CheckpointError(
                f"--resume: '{key}' was {before.get(key)} in {record} and is {now[key]} now; only "
                "'target', 'format', 'test_share' and how a server is reached may change"
            )
    elif resume and used:
        raise CheckpointError(f"--resume: {folder} holds no data set")
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(record, recipes.dump(recipe))
