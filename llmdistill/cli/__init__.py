"""The command line: one file a command, every heavy import inside the command."""

from __future__ import annotations

import sys

import typer

from llmdistill.cli.carve import carve
from llmdistill.cli.check import check
from llmdistill.cli.env import env
from llmdistill.cli.evaluate import evaluate
from llmdistill.cli.generate import generate
from llmdistill.cli.recipes import recipes
from llmdistill.cli.train import train
from llmdistill.errors import LlmDistillError, TrainingError

app = typer.Typer(
    name="llmdistill",
    help="Distil causal language models: a Hugging Face teacher in, a smaller student out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, generate, evaluate, carve, check, env):
    app.command()(command)
app.add_typer(recipes, name="recipes")

# How options are spelled here.  The library says "pass resume", which is right for Python, too.
FLAGS = {"resume": "--resume", "overwrite": "--overwrite", "push": "--push"}


def main() -> None:
    """Runs a command.  What a user can mend ends with exit code 2, a broken run with 1; no
    traceback.
    """
    try:
        app()
    except LlmDistillError as error:
        print(f"{type(error).__name__}: {error}{_flags(str(error))}", file=sys.stderr)
        sys.exit(1 if isinstance(error, TrainingError) else 2)


def _flags(message: str) -> str:
    """A line with the flags of the options that a message says to pass; "" if it names none."""
    named = [flag for option, flag in FLAGS.items() if f"pass {option}" in message.lower()]
    return f"\n(On the command line: {', '.join(named)}.)" if named else ""
