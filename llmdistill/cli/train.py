"""`llmdistill train`: run a recipe."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from llmdistill.cli.output import Quiet, Verbose

if TYPE_CHECKING:
    from llmdistill.recipe import Recipe
    from llmdistill.run import Result


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to change and their values: training.max_steps=50 output=runs/a"),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto|PATH|never",
            help="Continue the run in the run folder from its newest whole checkpoint (auto), or "
            "from the checkpoint PATH; or refuse a folder that has a run (never).",
        ),
    ] = "auto",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the run folder. The old one is kept until the new run has a checkpoint.",
        ),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Distil a student as a recipe describes: measure, train, measure again and export."""
    from llmdistill import recipe as recipes
    from llmdistill.data.local import require_local

    loaded = recipes.load(recipe, overrides or [])
    require_local(loaded)

    from llmdistill.cli import output

    output.set_up(quiet=quiet, verbose=verbose)

    from llmdistill.run import distill

    result = distill(loaded, resume=resume, overwrite=overwrite, show_progress=not quiet)
    if output.is_main():
        _show(result, loaded, quiet=quiet)


def _show(result: Result, recipe: Recipe, *, quiet: bool) -> None:
    """Print the figures, a few responses, the files and the next commands; or one path."""
    from llmdistill.cli import show
    from llmdistill.evaluation.measure import remarks
    from llmdistill.publish.card import figures_table
    from llmdistill.publish.report import REPORT

    if quiet:
        print(result.student)
        return
    if result.evaluation:
        # Short ones can be compared at a glance.
        some = sorted(result.answers, key=lambda one: len(one.prompt) + len(one.teacher))
        show.answers(some[:3])
        show.table(figures_table(result.evaluation), "Figures on the held-out rows")
        show.directions(result.evaluation["after"])
        show.remarks(remarks(result.evaluation))
    files = {}
    if (result.folder / REPORT).is_file():
        files[REPORT] = "everything below to look at, in a browser"
    files["student"] = "the model, its tokenizer and its model card"
    if result.evaluation:
        files["evaluation.json"] = "the figures above"
    if (result.folder / "responses").is_dir():
        files["responses"] = "what the teacher wrote to train on"
    files |= {"metrics.jsonl": "the loss of each step", "recipe.yaml": "this run's recipe"}
    if any((result.folder / "checkpoints").glob("checkpoint-*")):
        files["checkpoints"] = "states to resume from"
    show.files(result.folder, files)
    student, teacher = map(shlex.quote, (str(result.student), recipe.teacher_source[0]))
    measure = f"llmdistill evaluate {student} --teacher {teacher} --data mine.jsonl"
    load = "from transformers import AutoModelForCausalLM\n"
    load += f"  student = AutoModelForCausalLM.from_pretrained({str(result.student)!r})"
    steps = {"Load it in Python": load, "Measure it on rows of yours": measure}
    if not recipe.training.get("push_to_hub"):
        folder = shlex.quote(str(result.folder))
        steps["Upload it to the Hub, as private"] = f"llmdistill push {folder} me/my-student"
    show.next_steps(steps)
