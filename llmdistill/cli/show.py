"""What the commands print: tables, responses side by side, files and next steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from llmdistill.evaluation.measure import Figures
    from llmdistill.evaluation.results import Answers

console = Console()

LOWER_IS_BETTER = ("kl_teacher_text", "kl_own_text", "perplexity", "repeated_4grams")
HIGHER_IS_BETTER = (
    "top1_agreement", "draft_acceptance", "rouge_l_teacher", "rouge_l_references", "exact_match",
)  # fmt: skip
SHOWN_CHARACTERS = 400  # enough to judge a response at a glance


def table(rows: Sequence[Sequence[str]], title: str) -> None:
    """Print a header and rows, with numbers on the right."""
    header, *body = rows
    console.print(Text(title))  # not as the table's title: that wraps at the table's width
    shown = Table()
    for place, name in enumerate(header):
        # A name that is too long goes on in the next line, where its end can be read.
        shown.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in body:
        shown.add_row(*map(Text, row))
    console.print(shown)


def directions(figures: Figures) -> None:
    """Print which of the figures are better if they are lower, and which if they are higher."""
    for word, names in (("Lower", LOWER_IS_BETTER), ("Higher", HIGHER_IS_BETTER)):
        taken = [name for name in names if getattr(figures, name) is not None]
        console.print(f"{word} is better: {', '.join(taken)}.", highlight=False)


def remarks(sentences: Sequence[str]) -> None:
    """Print what the figures say about the student."""
    for sentence in sentences:
        console.print(sentence, highlight=False)


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
