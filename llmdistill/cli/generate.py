"""`llmdistill generate`: a teacher writes an instruction dataset."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from llmdistill.cli.output import Quiet, Verbose

if TYPE_CHECKING:
    from llmdistill.generate import Generated
    from llmdistill.instruct.generators.base import TaskGenerator
    from llmdistill.instruct.pipeline import TaskCounts
    from llmdistill.recipe import GenerationRecipe

logger = logging.getLogger("llmdistill")


def generate(
    recipe: Annotated[
        str, typer.Argument(help="A recipe, such as recipes/generate/magpie_cpu.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to change and their values: target=1000 output=data/mine"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a dataset that is not complete.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the dataset. The old one is kept until the new one is complete.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the first request to the teacher, and load no model."
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", help="Upload the finished dataset to the Hub as private: me/my-set."
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Let a teacher write instructions and answers, filter them, and save them as a dataset."""
    from llmdistill import recipe as recipes
    from llmdistill.data.local import require_local
    from llmdistill.errors import RecipeError

    loaded = recipes.load_generation(recipe, overrides or [])
    require_local(loaded)
    if resume and overwrite:
        raise RecipeError("--resume continues a dataset and --overwrite replaces it. Choose one.")

    from llmdistill.cli import output

    output.set_up(quiet=quiet, verbose=verbose)
    if dry_run:
        _show_request(loaded)
    else:
        _run(loaded, resume=resume, overwrite=overwrite, push=push, quiet=quiet)


def _show_request(recipe: GenerationRecipe) -> None:
    """Print the first request to the teacher, and bounds for the whole dataset."""
    from llmdistill.cli.show import console
    from llmdistill.generate import filled, planned

    generator = planned(recipe)
    for number, text in enumerate(filled(recipe, generator)):
        console.print("\nThen:\n" if number else "The first request to the teacher:\n")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{_estimate(generator, recipe.target)}", highlight=False, soft_wrap=True)


def _run(
    recipe: GenerationRecipe, *, resume: bool, overwrite: bool, push: str | None, quiet: bool
) -> None:
    """Write the dataset and print a line per round; then print its counts and its folder."""
    from llmdistill.cli.output import is_main
    from llmdistill.generate import generate as run
    from llmdistill.publish.hub import prepare, push_result

    main = is_main()
    spent, written, before = 0.0, 0, 0
    if push and main:
        prepare(push, "dataset")  # a missing permission should fail now, not after hours of writing

    def progress(counts: TaskCounts, seconds: float) -> None:
        nonlocal spent, written, before
        spent += seconds
        if seconds:  # otherwise the rows were recorded by an earlier run
            written += counts.kept - before
        elif not before:
            logger.info("the teacher writes, in rounds of %d calls", recipe.round_size)
        before = counts.kept
        if seconds or before:
            logger.info(_line(counts, recipe.target, written, spent))

    result = run(recipe, resume=resume, overwrite=overwrite, progress=progress)
    if not main:
        return
    address = push_result(result.folder, push) if push else None
    if quiet:
        print(result.folder)
    else:
        _show_result(result, spent, address)


def _show_result(result: Generated, spent: float, address: str | None) -> None:
    """Print the counts of a dataset, its files, where it was uploaded, and the next steps."""
    from llmdistill.cli import show
    from llmdistill.cli.show import console

    counts = result.counts
    for reason, number in counts.dropped.most_common():
        console.print(f"dropped {number:6d}  {reason}", highlight=False, markup=False)
    if counts.copies:
        console.print(
            f"{counts.copies} rows equal another row. The filter 'duplicates' drops them."
        )
    shares = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    console.print(f"kept {counts.kept} of {counts.made} in {spent:.0f} s: {shares}")
    files = {"train.jsonl": "the rows; `data.train` of a recipe takes this file"}
    if "test" in result.sizes:
        files["test.jsonl"] = "the rows of the test split"
    files |= {"README.md": "the dataset card", "recipe.yaml": "the recipe with all defaults"}
    files |= {"rows.jsonl, calls.jsonl": "the records that --resume continues"}
    show.files(result.folder, files)
    train = f"llmdistill train RECIPE data.train={result.folder}/train.jsonl"
    steps = {"Train a student on it": train}
    if address is None:
        steps["Upload it to the Hub, as private"] = f"llmdistill push {result.folder} me/my-set"
    else:
        console.print(f"\nUploaded to {address} (private).", highlight=False, soft_wrap=True)
    show.next_steps(steps)


def _estimate(generator: TaskGenerator, target: int | None) -> str:
    """Return upper bounds in calls and tokens.  The share that filters drop is not known yet."""
    cost, calls = generator.at_most, generator.num_calls
    if cost is None:
        return "How many calls and tokens a function of your own needs is not known."
    if target is not None:
        needed = -(-target // cost.tasks)
        calls = needed if calls is None else min(calls, needed)
    assert calls is not None  # the recipe's check refuses a generator without an end
    goal = f"{target:,} rows" if target is not None else "all prompts"
    return (
        f"{goal}: {calls:,} calls if every task is kept, with at most {cost.requests} "
        f"request{'s' * (cost.requests != 1)} each. "
        f"These write at most {calls * cost.tokens:,} tokens."
    )


def _line(counts: TaskCounts, target: int | None, new: int, seconds: float) -> str:
    """Return a progress line: rows, speed, share kept, time left, and why tasks were dropped.

    `new` of the rows were kept in the last `seconds`.
    """
    goal = f" of {target}" if target is not None else ""
    parts = [f"{counts.kept}{goal} rows"]
    speed = new / seconds if seconds else 0.0
    if seconds:
        parts.append(f"{speed:.2f} rows/s")
    parts.append(f"{counts.kept / max(counts.made, 1):.0%} kept")
    if target is not None and speed and counts.kept < target:
        parts.append(f"about {max(target - counts.kept, 0) / speed / 60:.0f} min left")
    why = ", ".join(f"{reason} {number}" for reason, number in counts.dropped.most_common(4))
    return ", ".join(parts) + (f"; dropped: {why}" if why else "")
