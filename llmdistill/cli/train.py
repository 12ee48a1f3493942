"""`llmdistill train`: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: training.max_steps=50 output=runs/mine"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the run folder; the old one stays until there is a checkpoint.",
        ),
    ] = False,
) -> None:
    """Distil a student as a recipe says: measure, train, measure, save."""
    from llmdistill import recipe as recipes

    loaded = recipes.load(recipe, overrides or [])

    import logging
    import os

    from llmdistill.cli import show
    from llmdistill.publish.card import figures_table
    from llmdistill.run import distill

    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("llmdistill").setLevel(logging.INFO)
    result = distill(loaded, resume=resume, overwrite=overwrite)
    if not is_main:
        return
    if result.evaluation:
        show.answers(result.answers[:3])
        show.table(figures_table(result.evaluation), "on rows held back from training")
    show.console.print(f"student: {result.student}", soft_wrap=True)
