"""`llmdistill check`: inspect everything that a run would use, without training."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmdistill.cli.output import Verbose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmdistill.data.collate import EncodedRows
    from llmdistill.recipe import Recipe


def check(
    recipe: Annotated[str, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to change and their values: data.train=x.jsonl"),
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Also time two training steps. Nothing is saved.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Examine a recipe without training: tokenizers, rows, licences, memory, disk and time."""
    from llmdistill import recipe as recipes
    from llmdistill.data.local import require_local

    loaded = recipes.load(recipe, overrides or [])
    require_local(loaded)

    from llmdistill.cli import look, output, show
    from llmdistill.cli.show import console

    output.set_up(quiet=True, verbose=verbose)  # the lines below say more than the log

    from llmdistill.cost import LOOKED_AT, disk

    # Of a recipe of several runs, the first one is looked at: the others need its student.
    whole, loaded = loaded, loaded.stages[0]
    run_folder = f"The run folder would be {whole.output}."
    console.print(f"recipe       {recipe} is valid. {run_folder}", soft_wrap=True, markup=False)
    tokenizer, fits = _pair(loaded)
    train, alike = _data(loaded, tokenizer)
    _models(loaded)
    _runs(whole)
    _compared(loaded)
    _lines("licences", look.licences(whole))
    console.print("example      the student is trained on the tokens in brackets:\n")
    console.print(look.marked(train.head(1)[0], tokenizer, written=not loaded.rollout.takes_data))
    if train.counts.control_texts:
        console.print("\n             \\ marks text that only looks like a control token")
    console.print()
    counted = look.lengths(train.head(LOOKED_AT), answers=loaded.rollout.takes_data)
    show.table(counted, f"Lengths: {look.cut_in_words(train)}")
    parts = _memory(loaded, train)
    said, has_room = look.disk(Path(whole.output), disk(whole, train, parts))
    _line("disk", said)
    if not (fits and alike and has_room):
        raise typer.Exit(2)
    if time:
        _time(loaded, train)
    show.next_steps({"Train it": _command(recipe, overrides or [])})


def _command(recipe: str, overrides: Sequence[str]) -> str:
    """Return the command that trains on all GPUs of this machine, or on its CPU."""
    import torch

    number = torch.cuda.device_count()
    launch = ["accelerate", "launch", "--num_processes", str(number), "-m"] if number > 1 else []
    return shlex.join([*launch, "llmdistill", "train", recipe, *overrides])


def _lines(label: str, texts: Iterable[str]) -> None:
    for place, text in enumerate(texts):
        _line("" if place else label, text)


def _line(label: str, text: str) -> None:
    from llmdistill.cli.show import console

    console.print(f"{label:12} {text}", soft_wrap=True, markup=False, highlight=False)


def _data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedRows, bool]:
    """Print how many rows there are, whether each teacher renders them as the student does, and
    what the teacher reads of them.

    Returns the rows, and whether the teachers render them alike.
    """
    from llmdistill.cli.show import console
    from llmdistill.data.build import load_data
    from llmdistill.data.collate import PromptDataset
    from llmdistill.data.context import require_context
    from llmdistill.errors import VocabularyError
    from llmdistill.run import parts_of, training_arguments
    from llmdistill.teachers.build import check_rows
    from llmdistill.training.guards import require_a_batch

    said = "teacher and student render the rows as the same tokens"
    fits = True
    try:
        train, held = load_data(recipe, tokenizer, warn=False)
        train.head(1)  # the rows of a stream are rendered when they are read
    except VocabularyError as error:
        said, fits = str(error), False
        train, held = load_data(recipe, tokenizer, compare=False, warn=False)
    console.print(f"template     {said}", soft_wrap=True, markup=False, highlight=False)
    known = "a stream"
    if isinstance(train, PromptDataset):
        known = f"{len(train)} rows (usable: {train.counts})"
    console.print(f"data         train {known}", highlight=False, markup=False)
    for note in train.counts.notes():
        console.print(f"             {note}", soft_wrap=True, highlight=False, markup=False)
    if held is not None:
        console.print(
            f"             held out {len(held)} rows (usable: {held.counts})", highlight=False
        )
    check_rows(recipe.teacher, parts_of(recipe, tokenizer, train, held))
    require_a_batch(train, training_arguments(recipe, Path(recipe.output)))
    require_context(recipe, train, held)
    return train, fits


def _pair(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, bool]:
    """Print whether the vocabularies of each teacher and the student match, and what each tokenizer
    does.

    Returns the student's tokenizer, and whether the pair can be trained.
    """
    from llmdistill.cli import look
    from llmdistill.cli.show import console
    from llmdistill.data.build import load_student_tokenizer
    from llmdistill.models.load import load_config, load_tokenizer
    from llmdistill.models.vocabulary import VocabularyMatch, compare

    name, revision = recipe.student.model, recipe.student.revision
    student = load_student_tokenizer(recipe)
    rows = load_config(name, revision=revision).get_text_config().vocab_size
    fits = True
    for base, of_base in dict.fromkeys(recipe.teacher.paired(recipe.student)):
        teacher = load_tokenizer(base, revision=of_base)
        teacher_rows = load_config(base, revision=of_base).get_text_config().vocab_size
        found = compare(teacher, student, teacher_rows, rows)
        reason = found.reason or f"{found.shared} shared ids"
        # The reason quotes tokens, and `[/INST]` would be read as markup.
        console.print(f"vocabulary   {found.match.value}: {reason}", soft_wrap=True, markup=False)
        _line("teacher's", look.tokenizer_in_words(teacher, load_config(base, revision=of_base)))
        fits = fits and found.match is not VocabularyMatch.DIFFERENT
    _line("student's", look.tokenizer_in_words(student, load_config(name, revision=revision)))
    return student, fits


def _models(recipe: Recipe) -> None:
    """Print what is loaded where, what is trained, and the runs of a recipe of several runs."""
    from llmdistill.models.build import ROUNDS
    from llmdistill.models.load import default_device

    here = "cpu" if recipe.training.get("use_cpu") else str(default_device())

    for place, one in enumerate(recipe.teacher.models):
        kept = [one.dtype, one.quantization, None if one.placement == "whole" else one.placement]
        form = ", ".join(part for part in kept if part)
        _line("" if place else "teacher", f"{one.model} on {one.device or here} ({form})")
    if recipe.teacher.who:
        _line("" if recipe.teacher.models else "teacher", recipe.teacher.who)
    if recipe.evaluate.against is not None:
        _line("measured", f"against {recipe.evaluate.against.model}")
    student = recipe.student
    trained = "all weights" if student.peft is None else f"an adapter of rank {student.peft.r}"
    carved = ", carved" if student.carve is not None else ""
    _line("student", f"{student.model}{carved} on {here} ({student.dtype})")
    more = f", and {recipe.teacher.trains}" if recipe.teacher.trains else ""
    _line("trained", f"{trained} of the student{more}")
    if student.rounds_its_steps:
        _line("", ROUNDS)


def _runs(recipe: Recipe) -> None:
    """Print the runs of a recipe of several runs."""
    from llmdistill.cli.show import console

    stages = recipe.stages
    for place, stage in enumerate(stages, start=1):
        taught = ", ".join(name for name, _ in stage.teacher_sources)
        text = f"run {place} of {len(stages)}   {taught} teaches {stage.student.model} in "
        if len(stages) > 1:
            console.print(text + stage.output, soft_wrap=True, markup=False, highlight=False)


def _compared(recipe: Recipe) -> None:
    """Print which objectives compare samples, and how many rows share a micro-batch."""
    from llmdistill.cli.show import console
    from llmdistill.objectives.build import build_objectives

    found = [one for one in build_objectives(recipe.objectives) if one.compares_samples]
    if found:
        rows = int(recipe.training.get("per_device_train_batch_size", 8))
        names = ", ".join(one.name for one in found)
        shown = f"{names}: the samples of a micro-batch of {rows} rows are compared"
        least = max(one.least_rows for one in found)
        if rows < least:
            shown += f", but at least {least} rows are needed: use {-(-least // rows)} processes"
        console.print(f"objectives   {shown}", soft_wrap=True, highlight=False)


def _memory(recipe: Recipe, train: EncodedRows) -> dict[str, float]:
    from llmdistill.cli import show
    from llmdistill.cost import memory

    parts = memory(recipe, train)
    sizes = [*parts.items(), ("total", sum(parts.values()))]
    rows = [[name, f"{size / 2**30:.2f}"] for name, size in sizes if size]
    show.console.print()
    show.table([["", "GiB"], *rows], "Memory on one device, estimated for the longest rows")
    return parts


def _time(recipe: Recipe, train: EncodedRows) -> None:
    from llmdistill.cli.show import console
    from llmdistill.cost import num_steps, seconds_per_step

    steps, all_seconds = num_steps(recipe, train), 0.0
    for writer, (seconds, share) in seconds_per_step(recipe).items():
        console.print(
            f"time         {seconds:.1f} s per step on this machine, with responses of {writer}"
        )
        all_seconds += seconds * (1.0 if share is None else share)
    total = steps * all_seconds
    shown = f"{total / 3600:.1f} hours" if total >= 3600 else f"{total / 60:.1f} minutes"
    console.print(f"             {steps} steps: at most {shown}, without the evaluations")
