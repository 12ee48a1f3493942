"""`llmdistill report`: show what runs have done."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders; several are compared.")],
    output: Annotated[
        str | None,
        typer.Option(help="File to write. Default: report.html in the run folder, or here."),
    ] = None,
) -> None:
    """Write the report of one or several runs: an HTML page, and its charts as PNG files."""
    from llmdistill.cli.output import set_up

    set_up(quiet=True)

    from llmdistill.publish.report import write_report

    written = write_report(runs, output)
    print(written.page)
