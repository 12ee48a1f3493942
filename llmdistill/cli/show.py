"""What the commands print: tables, responses side by side, files and next steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from llmdistill.run import Answers

console = Console()

MEANING = (
    "Lower is better for kl_*, perplexity and repeated_4grams, higher for top1_agreement,\n"
    "draft_acceptance, rouge_l_* and exact_match."
)
SHOWN_CHARACTERS = 400  # enough to judge a response at a glance


def table(rows: Sequence[Sequence[str]], title: str) -> None:
    """Print a header and rows, with numbers on the right."""
    header, *body = rows
    shown = Table(title=Text(title), title_justify="left")
    for place, name in enumerate(header):
        shown.add_column(name, justify="right" if place else "left")
    for row in body:
        shown.add_row(*map(Text, row))
    console.print(shown)


def answers(some: Sequence[Answers]) -> None:
    """Print a few prompts with the responses of the teacher and of the student before and after."""
    for answer in some:
        title = Text(f"Prompt: {_short(answer.prompt)}")
        shown = Table(title=title, title_justify="left", show_lines=True)
        for name in ("teacher", "student before", "student after"):
            shown.add_column(name, ratio=1)
        texts = (answer.teacher, answer.before, answer.after)
        shown.add_row(*(Text(_short(text) or "(empty)") for text in texts))
        console.print(shown)


def files(folder: Path, contents: Mapping[str, str]) -> None:
    """Print a folder with the files in it and what each one is."""
    console.print(Text(f"\n{folder}"), soft_wrap=True)
    width = max(map(len, contents))
    for name, what in contents.items():
        console.print(Text(f"  {name:{width}}  {what}"), soft_wrap=True)


def next_steps(steps: Mapping[str, str]) -> None:
    """Print what a user can do next, each with its command or line of Python."""
    console.print()
    for what, command in steps.items():
        console.print(Text(f"{what}:\n  {command}"), soft_wrap=True)


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS].rstrip()} ..."
