"""`generate(recipe)`: build teacher, generator and filters, run the pipeline, write the dataset."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from llmdistill import recipe as recipes
from llmdistill import run_folder
from llmdistill.data.render import open_user_turn
from llmdistill.errors import CheckpointError, DataError, RecipeError
from llmdistill.instruct.build import (
    build_filters,
    build_generator,
    build_responder,
    with_judge,
)
from llmdistill.instruct.dataset import SPLITS, write_splits
from llmdistill.instruct.generators.base import TaskGenerator
from llmdistill.instruct.lion import Pools
from llmdistill.instruct.pipeline import Pipeline, Settings, TaskCounts
from llmdistill.instruct.pools import tell_apart
from llmdistill.instruct.records import read_whole_lines, replace_text
from llmdistill.instruct.requests import Reply, Request
from llmdistill.instruct.responders import LocalResponder, RemoteResponder
from llmdistill.instruct.task_sources import read_tasks
from llmdistill.models.load import load_tokenizer, revision_of
from llmdistill.publish.data_card import Outcome, data_card
from llmdistill.publish.names import public_model
from llmdistill.recipe.generators import LionRecipe

logger = logging.getLogger("llmdistill")

# Columns that a card names first.
COLUMNS = (
    *("messages", "prompt", "chosen", "rejected", "system", "history", "instruction", "input"),
    "output",
)
# Ranks wait this long for each other: one may compare two models, or wait for a slow server.
RANKS_WAIT = timedelta(hours=6)


@dataclass(frozen=True)
class Generated:
    """Result of a run: its folder, the number of rows in each split, and the counts of tasks."""

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
    """Generate the dataset of a recipe.

    `progress` is called with the counts so far and the seconds of each round.

    An existing folder is only used with `resume` (continue the run in it) or `overwrite` (replace
    it); otherwise CheckpointError is raised.  Nothing is written before recipe, rows and teacher
    are loaded.  A replaced dataset is kept as `<output>.old` until the splits of the new one are
    written, because until then the filters may still drop every row.

    Raises other LlmDistillErrors for mistakes in the recipe, its rows, the models or the server.
    """
    folder = Path(recipe.output)
    _ranks()
    # Only the first rank checks the folder, because only that one writes there.  The others wait.
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            _check(folder, recipe, resume=resume, overwrite=overwrite)
    # Cached, so that it runs once: Lion's comparison already calls it while the parts are built.
    begin = functools.cache(functools.partial(_begin, folder, recipe, overwrite=overwrite))
    pipeline = _load(recipe, folder, begin=begin, is_new=overwrite)
    begin()
    PartialState().wait_for_everyone()
    pipeline.run(progress)
    if not pipeline.counts.kept:
        raise DataError(
            f"no row was kept of {pipeline.counts.made} tasks: {dict(pipeline.counts.dropped)}. "
            "Change 'filters' or the generator. The replies are recorded: pass resume to filter "
            "them again."
        )
    sizes = _finish(folder, recipe, pipeline) if PartialState().is_main_process else {}
    PartialState().wait_for_everyone()
    return Generated(folder, sizes, pipeline.counts)


def _finish(folder: Path, recipe: recipes.GenerationRecipe, pipeline: Pipeline) -> dict[str, int]:
    """Write the splits and the card of a finished run, and return the sizes of the splits."""
    keeps_thinking = recipe.thinking == "keep"
    sizes = write_splits(
        folder, format=recipe.format, test_share=recipe.test_share, keeps_thinking=keeps_thinking,
        images=recipe.teacher.image_column,
    )  # fmt: skip
    counts, revision = pipeline.counts, pipeline.settings.about["revision"]
    if counts.thought:
        done = "saved with" if keeps_thinking else "dropped from"
        logger.info("the thinking of the teacher was %s %d rows", done, counts.thought)
    if counts.unscored:
        logger.warning("%d rows lack a score: the judge's reply had none", counts.unscored)
    names = {name for row in read_whole_lines(folder / "train.jsonl") for name in row}
    columns = [name for name in COLUMNS if name in names] + sorted(names - set(COLUMNS))
    made = Outcome(sizes, counts.dropped, counts.variants, revision, counts.copies, columns)
    replace_text(folder / "README.md", data_card(recipe, made))
    run_folder.discard_old(folder)
    pipeline.replies.tidy()
    return sizes


def _load(
    recipe: recipes.GenerationRecipe, folder: Path, *, begin: Callable[[], None], is_new: bool
) -> Pipeline:
    """Build the pipeline.  Only Lion's comparison may write to `folder` here."""
    # Rows and filters first: their mistakes show in seconds, the teacher may take minutes to load.
    seed_tasks = read_tasks(
        recipe.seed_tasks, on_bad_row=recipe.on_bad_row, is_sent=recipe.teacher.is_remote
    )
    filters = build_filters(recipe, seed_tasks)
    logger.info("loading the teacher %s", recipe.teacher.model)
    responder = build_responder(recipe)
    split = functools.partial(
        tell_apart, recipe, responder, folder=folder, begin=begin, is_new=is_new
    )
    generator = build_generator(recipe, seed_tasks, split)
    about = {
        "generator": recipe.generator.kind,
        "teacher": public_model(recipe.teacher.model, is_remote=recipe.teacher.is_remote),
        "revision": _revision(recipe, responder),
        "sampling": _samplings(recipe),
        "seed": recipe.seed,
    }
    images = recipe.teacher.image_column
    settings = Settings(folder, recipe.target, recipe.round_size, about, images)
    return Pipeline(generator, with_judge(recipe, responder), filters, settings)


def _ranks() -> None:
    """Set up the group of ranks, on CPUs as well.

    Raises RecipeError if several processes were started that do not form one group.
    """
    # accelerate takes the timeout from the first PartialState that is made, so it is made here.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=RANKS_WAIT)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise RecipeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not form one group: "
            "each of them would write the whole dataset. Start them with torchrun."
        )


def _revision(recipe: recipes.GenerationRecipe, responder: LocalResponder | RemoteResponder) -> str:
    """Return the teacher's revision: the commit that was loaded if known, else the recipe's."""
    found = ""
    if isinstance(responder, LocalResponder):
        found = revision_of(responder.teacher.model, recipe.teacher.model)
    return found or recipe.teacher.revision or ""


def planned(recipe: recipes.GenerationRecipe) -> TaskGenerator:
    """Return the generator of a recipe without loading a model, for a dry run.

    Lion's pools are not known yet, so both of them are the whole pool.
    """

    def unsplit(section: LionRecipe) -> Pools:
        tasks = read_tasks(section.pool)
        return Pools(hard=tasks, easy=tasks)

    return build_generator(recipe, read_tasks(recipe.seed_tasks), unsplit)


def filled(recipe: recipes.GenerationRecipe, generator: TaskGenerator) -> list[str]:
    """Return the text of the first request of each stage of the first call that makes requests.

    No teacher is asked: each reply is a fixed text.  Raises DataError if no call makes a request.
    """
    calls = generator.num_calls if generator.num_calls is not None else 1
    for call in (generator.call(number, []) for number in range(calls)):
        texts: list[str] = []
        # The exchange ends by itself: StopIteration carries its tasks, which are of no interest.
        with contextlib.suppress(StopIteration):
            requests = next(call)
            while True:
                texts.append(_filled(recipe, requests[0]))  # the others of a stage look the same
                requests = call.send([Reply("(what it wrote)") for _ in requests])
        if texts:
            return texts
    raise DataError(
        "no row of generator.prompts can be used, so there is nothing to ask the teacher. Check "
        "that the rows have what the generator needs (for 'rewrite', an answer)."
    )


def _filled(recipe: recipes.GenerationRecipe, request: Request) -> str:
    """Return a request as text.

    A user's turn is shown as the chat template opens it.  The start of the reply is left out for a
    server, which is not told about it.
    """
    teacher = recipe.teacher
    if request.turn == "user":
        assert teacher.tokenizer_source is not None  # such a recipe is refused without one
        name, revision = teacher.tokenizer_source
        tokenizer = load_tokenizer(name, revision=revision)
        ids = open_user_turn(tokenizer, recipe.chat_template_kwargs, request.messages)
        return f"{tokenizer.decode(ids)}..."
    asked = [f"[{message['role']}]\n{message['content']}" for message in request.messages]
    start = "" if teacher.is_remote else request.start
    return "\n".join([*asked, f"[{request.turn}]\n{start}..."])


def _samplings(recipe: recipes.GenerationRecipe) -> str:
    """Return the sampling settings of the generator as JSON, by their dotted keys."""
    samplings = recipe.generator.samplings
    drawn = {name: sampling.model_dump(mode="json") for name, sampling in samplings.items()}
    return json.dumps(drawn, sort_keys=True)


def _check(
    folder: Path, recipe: recipes.GenerationRecipe, *, resume: bool, overwrite: bool
) -> None:
    """Raise CheckpointError if the folder may not be used, or its recipe has changed."""
    # A folder with only a recipe is from a start that failed.  There is nothing to resume.
    is_going_on = resume and run_folder.is_used(folder)
    run_folder.check(folder, resume=is_going_on, overwrite=overwrite, noun="dataset")
    if not is_going_on:
        return
    record = folder / run_folder.RECORD
    recorded = recipes.load_generation(record)
    before, now = recorded.unchanging(), recipe.unchanging()
    if recipe.batch_size != recorded.batch_size and not recipe.teacher.is_remote:
        logger.info("with another 'batch_size', new replies differ by the rounding of the teacher")
    if recipe.needs_log_probs and not recorded.needs_log_probs:
        raise CheckpointError(
            "a filter now needs log-probabilities, which the recorded replies do not have. Remove "
            "it, or choose another folder."
        )
    if changed := [key for key in now if before.get(key) != now[key]]:
        key = changed[0]
        may_change = ", ".join(f"'{name}'" for name in recipe.may_change)
        raise CheckpointError(
            f"'{key}' was {before.get(key)} in {record} and is {now[key]} now. A resumed run can "
            f"change only {may_change} and how a server is reached. Restore '{key}', or choose "
            "another folder."
        )


def _begin(folder: Path, recipe: recipes.GenerationRecipe, *, overwrite: bool) -> None:
    """Claim the folder on the first rank, and record the recipe in it."""
    if PartialState().is_main_process:
        run_folder.claim(folder, overwrite=overwrite, results=[f"{name}.jsonl" for name in SPLITS])
        replace_text(folder / run_folder.RECORD, recipes.dump(recipe))
