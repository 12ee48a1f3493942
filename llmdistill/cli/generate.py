"""`llmdistill generate`: a teacher writes an instruction data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmdistill.instruct.generators.base import TaskGenerator
    from llmdistill.instruct.pipeline import TaskCounts
    from llmdistill.recipe import GenerationRecipe


def generate(
    recipe: Annotated[str, typer.Argument(help="A recipe, such as recipes/magpie_cpu.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: target=1000 output=data/mine")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the data set when the new one is complete.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the teacher is asked; load no model.")
    ] = False,
    push: Annotated[
        str | None, typer.Option("--push", help="Then upload it to the Hub, private: me/my-set.")
    ] = None,
) -> None:
    """Let a teacher write instructions and answers, keep the good ones, and leave a data set."""
    from llmdistill import recipe as recipes
    from llmdistill.errors import RecipeError

    loaded = recipes.load_generation(recipe, overrides or [])
    if resume and overwrite:
        raise RecipeError("--resume continues a data set, --overwrite replaces it: choose one")
    if dry_run:
        _show_request(loaded)
    else:
        _run(loaded, resume=resume, overwrite=overwrite, push=push)


def _show_request(recipe: GenerationRecipe) -> None:
    """What the teacher is asked first, and what the whole may take."""
    from llmdistill.cli.show import console
    from llmdistill.generate import filled, planned

    generator = planned(recipe)
    for number, text in enumerate(filled(recipe, generator)):
        console.print("\nand then:\n" if number else "", end="")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{_estimate(generator, recipe.target)}", highlight=False, soft_wrap=True)


def _run(recipe: GenerationRecipe, *, resume: bool, overwrite: bool, push: str | None) -> None:
    """Makes the data set, showing each round; then its counts, and where it is."""
    import os

    from llmdistill.cli.show import console
    from llmdistill.generate import generate as run
    from llmdistill.publish.data_card import prepare_push
    from llmdistill.publish.data_card import push as upload

    is_main = os.environ.get("RANK", "0") == "0"
    spent, there = 0.0, 0
    if push and is_main:
        prepare_push(push)  # before hours of writing, not after them

    def progress(counts: TaskCounts, seconds: float) -> None:
        nonlocal spent, there
        spent += seconds
        if not seconds:
            there = counts.kept
        if is_main and (seconds or there):
            line = _line(counts, recipe.target, counts.kept - there, spent)
            console.print(line, markup=False, soft_wrap=True)

    result = run(recipe, resume=resume, overwrite=overwrite, progress=progress)
    if not is_main:
        return
    counts = result.counts
    for reason, number in counts.dropped.most_common():
        console.print(f"dropped {number:6d}  {reason}", highlight=False)
    shares = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    console.print(f"kept {counts.kept} of {counts.made} in {spent:.0f} s: {shares}")
    console.print(f"data set: {result.folder}", soft_wrap=True)
    if push:
        upload(result.folder, push)
        console.print(f"pushed to {push}")


def _estimate(generator: TaskGenerator, target: int | None) -> str:
    """Bounds, in calls and in tokens: how many rows the filters keep shows only while it runs."""
    cost, calls = generator.at_most, generator.num_calls
    if target is not None:
        needed = -(-target // cost.tasks)
        calls = needed if calls is None else min(calls, needed)
    assert calls is not None  # a recipe without an end is refused
    goal = f"{target} rows" if target is not None else "all prompts"
    return (
        f"{goal}: {calls} calls if every task is kept, of at most {cost.requests} requests each; "
        f"at most {calls * cost.tokens:,} tokens are written then"
    )


def _line(counts: TaskCounts, target: int | None, new: int, seconds: float) -> str:
    """Rows so far, speed, share kept, time left, and why tasks were dropped; `new` rows took
    `seconds`.
    """
    goal = f" of {target}" if target is not None else ""
    parts = [f"{counts.kept}{goal} rows"]
    speed = new / seconds if seconds else 0.0
    if seconds:
        parts.append(f"{speed:.2f} rows/s")
    parts.append(f"{counts.kept / max(counts.made, 1):.0%} kept")
    if target is not None and speed:
        parts.append(f"about {max(target - counts.kept, 0) / speed / 60:.0f} min left")
    why = ", ".join(f"{reason} {number}" for reason, number in counts.dropped.most_common(4))
    return ", ".join(parts) + (f"; dropped: {why}" if why else "")
