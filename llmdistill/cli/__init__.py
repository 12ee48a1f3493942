"""The command line: one file per command.

Heavy imports are inside the commands, so that `llmdistill --help` answers at once.
"""

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

# The flags of options.  Errors of the library say "pass resume", which is also right in Python.
FLAGS = {"resume": "--resume", "overwrite": "--overwrite", "push": "--push"}


def main() -> None:
    """Run a command.  Exits with 2 after an error that the user can fix, with 1 after a failed run.

    Errors of llmdistill are printed without a traceback.
    """
    try:
        app()
    except LlmDistillError as error:
        print(f"{type(error).__name__}: {error}{_flags(str(error))}", file=sys.stderr)
        sys.exit(1 if isinstance(error, TrainingError) else 2)


def _flags(message: str) -> str:
    """Return a line with the flags of the options that a message names, or "" if it names none."""
    named = [flag for option, flag in FLAGS.items() if f"pass {option}" in message.lower()]
    return f"\n(On the command line: {', '.join(named)}.)" if named else ""
