"""What the commands print: tables and answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from llmdistill.run import Answers

console = Console()


def table(rows: Sequence[Sequence[str]], title: str) -> None:
    """A header and rows; numbers on the right."""
    header, *body = rows
    shown = Table(title=title, title_justify="left")
    for place, name in enumerate(header):
        shown.add_column(name, justify="right" if place else "left")
    for row in body:
        shown.add_row(*map(Text, row))
    console.print(shown)


def answers(some: Sequence[Answers]) -> None:
    """A few prompts with what teacher, carved student and distilled student answer."""
    for answer in some:
        shown = Table(title=Text(answer.prompt[-400:]), title_justify="left", show_lines=True)
        for name in ("teacher", "student before", "student after"):
            shown.add_column(name, ratio=1)
        shown.add_row(Text(answer.teacher), Text(answer.before), Text(answer.after))
        console.print(shown)
