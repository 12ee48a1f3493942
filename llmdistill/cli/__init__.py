"""The command line: one file per command.

Heavy imports are inside the commands, so that `llmdistill --help` answers at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Annotated

import typer

from llmdistill import __version__
from llmdistill.cli.carve import carve
from llmdistill.cli.check import check
from llmdistill.cli.env import env
from llmdistill.cli.evaluate import evaluate
from llmdistill.cli.export import export
from llmdistill.cli.generate import generate
from llmdistill.cli.push import push
from llmdistill.cli.recipes import recipes
from llmdistill.cli.report import report
from llmdistill.cli.train import train
from llmdistill.errors import LlmDistillError, StoppedError, TrainingError


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llmdistill {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="llmdistill",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMMANDS = (train, report, evaluate, export, push, carve, check, generate, env)
for command in COMMANDS:
    app.command()(command)
app.add_typer(recipes, name="recipes")


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Distil causal language models: a Hugging Face teacher in, a smaller student out."""


# On a CPU, oneDNN keeps a kernel for each shape that it has met, up to 1,024 of them, which took
# more than 1 GB in the quickstart.  With 64 a step is as fast.
KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

# Errors of the library say "pass resume", which is also right in Python.  Here it is a flag.
OPTION = re.compile(r"\b(pass|without) (resume|overwrite|push)\b", flags=re.IGNORECASE)
# In Python a keyword has a value, and the flag of a command has another name.
KEYWORDS = {"pass private=False": "pass --public", "pass revision=": "pass --revision "}


def main() -> None:
    """Run a command, and print errors of llmdistill without a traceback.

    Exits with 2 after an error that the user can fix, with 1 after a failed run, and with 143 after
    SIGTERM, as a shell reports it.  `docs/troubleshooting.md` lists all exit codes.
    """
    os.environ.setdefault(*KERNELS)  # read when torch first multiplies
    try:
        app()
    except LlmDistillError as error:
        message = OPTION.sub(r"\1 --\2", str(error))
        for keyword, flag in KEYWORDS.items():
            message = message.replace(keyword, flag)
        print(f"{type(error).__name__}: {message}", file=sys.stderr)
        if isinstance(error, StoppedError):
            sys.exit(128 + signal.SIGTERM)
        sys.exit(1 if isinstance(error, TrainingError) else 2)
