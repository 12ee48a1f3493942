"""What a command prints while it runs: its own steps, without the noise of libraries.

Progress and warnings go to stderr. Results go to stdout, so `llmdistill train ... --quiet` prints
nothing but the path of the student there.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Annotated

import typer

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only warnings, errors and the result."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also print the bars and warnings of libraries.")
]

# Loggers whose warnings say nothing about a run.
NOISY = (
    "torchao",  # lists compiled kernels of other Python versions and GPUs that it did not load
    "torch.utils._pytree",  # a deprecation inside torchao, for torchao's authors
    "bitsandbytes.backends.cpu.ops",  # an optional kernel that would be downloaded from the Hub
)


# In assisted generation, which `evaluate` uses, transformers calls what it has deprecated.
OWN_CALL = ("transformers.generation.utils", "Passing `generation_config` together with")


class Once(logging.Filter):
    """Lets the first message of a logger pass."""

    def __init__(self) -> None:
        super().__init__()
        self._passed = False

    def filter(self, record: logging.LogRecord) -> bool:
        is_first, self._passed = not self._passed, True
        return is_first


class Without(logging.Filter):
    """Drops the messages of a logger that start with a text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)


class Elapsed(logging.Formatter):
    """A step of ours with the time since the start; a library's message with its name."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.name.partition(".")[0] != "llmdistill":
            return f"{record.levelname.lower()} from {record.name}: {message}"
        minutes, seconds = divmod(int(record.relativeCreated / 1000), 60)
        warning = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"[{minutes:3d}:{seconds:02d}] {warning}{message}"


def is_main() -> bool:
    """Whether this is the only process, or the first one of `torchrun` or `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def set_up(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send log messages to stderr: our steps unless `quiet`, the libraries' noise if `verbose`.

    Imports transformers, so a command calls it after it has read its arguments.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(Elapsed())
    logging.basicConfig(handlers=[handler])
    # The other ranks print only warnings, or each line would come once per rank.
    steps = is_main() and not quiet
    logging.getLogger("llmdistill").setLevel(logging.INFO if steps else logging.WARNING)
    if verbose:
        return
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    name, start = OWN_CALL
    logging.getLogger(name).addFilter(Without(start))
    # Without a network each of many retries is a warning, and the Hub's logger has a handler, too.
    hub = logging.getLogger("huggingface_hub.utils._http")
    hub.addFilter(Once())
    logging.getLogger("huggingface_hub").propagate = False
    _hide_bars(downloads=quiet)


def _hide_bars(*, downloads: bool) -> None:
    """Hide transformers' bars of loading and saving weights, and those of `downloads` if asked to.

    A download can take an hour, so its bar stays by default.
    """
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if downloads:
        datasets.disable_progress_bars()
    with warnings.catch_warnings():
        # Each call warns if the variable HF_HUB_DISABLE_PROGRESS_BARS has decided already.
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()  # disables the Hub's bars, too
        if not downloads:
            enable_progress_bars()
