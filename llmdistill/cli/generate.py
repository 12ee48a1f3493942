"""`llmdistill generate`: a teacher writes an instruction data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmdistill.instruct.pipeline import Counts
    from llmdistill.recipe import GenerationRecipe


def generate(
    recipe: Annotated[str, typer.Argument(help="A recipe, such as recipes/magpie_cpu.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: target=1000 output=data/mine")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the data set first.")
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

    loaded = recipes.load_generation(recipe, overrides or [])

    if dry_run:
        _show_request(loaded)
    else:
        _run(loaded, resume=resume, overwrite=overwrite, push=push)


def _show_request(recipe: GenerationRecipe) -> None:
    """What the teacher is asked first."""
    from llmdistill.cli.show import console
    from llmdistill.generate import first_request

    request = first_request(recipe)
    for message in request.messages:
        console.print(f"[{message['role']}]", markup=False)
        console.print(message["content"], markup=False, highlight=False)
    console.print(f"[{request.turn}]{request.start or ' ...'}", markup=False)
    goal = f"{recipe.target} rows" if recipe.target else "all prompts"
    console.print(f"\nuntil {goal}; at most {request.max_new_tokens} tokens a reply")


def _run(recipe: GenerationRecipe, *, resume: bool, overwrite: bool, push: str | None) -> None:
    """Makes the data set, showing each round; then its counts, and where it is."""
    import os

    from llmdistill.cli.show import console
    from llmdistill.generate import generate as run
    from llmdistill.publish.data_card import push as upload

    is_main = os.environ.get("RANK", "0") == "0"
    done, spent = [0], [0.0]

    def progress(counts: Counts, seconds: float) -> None:
        spent[0] += seconds
        new, done[0] = counts.kept - done[0], counts.kept
        if is_main:
            console.print(_line(counts, recipe.target, new, seconds), markup=False)

    result = run(recipe, resume=resume, overwrite=overwrite, progress=progress)
    if not is_main:
        return
    counts = result.counts
    for reason, number in counts.dropped.most_common():
        console.print(f"dropped {number:6d}  {reason}", highlight=False)
    shares = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    console.print(f"kept {counts.kept} of {counts.made} in {spent[0]:.0f} s: {shares}")
    console.print(f"data set: {result.folder}", soft_wrap=True)
    if push:
        upload(result.folder, push)
        console.print(f"pushed to {push}")


def _line(counts: Counts, target: int | None, new: int, seconds: float) -> str:
    """One round: rows so far, speed, share kept, time left."""
    speed = new / seconds if seconds else 0.0
    left = ""
    if target is not None and speed:
        left = f", about {max(target - counts.kept, 0) / speed / 60:.0f} min left"
    share = counts.kept / max(counts.made, 1)
    goal = f" of {target}" if target is not None else ""
    return f"{counts.kept}{goal} rows, {speed:.2f} rows/s, {share:.0%} kept{left}"
