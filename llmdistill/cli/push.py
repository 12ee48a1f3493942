"""`llmdistill push`: upload a run, a model or a dataset to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from llmdistill.cli.output import Quiet, Verbose


def push(
    folder: Annotated[
        str,
        typer.Argument(
            help="A run folder, a model folder with a card, or a dataset of `llmdistill generate`."
        ),
    ],
    name: Annotated[str, typer.Argument(help="The repository on the Hub, such as me/my-model.")],
    public: Annotated[
        bool,
        typer.Option(
            "--public/--private", help="Everybody can see the repository, or only its owners."
        ),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Upload to this branch."),
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", help="Open a pull request, and change nothing else."),
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="The message of the commit.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload a run, a model or a dataset to the Hub, with its card and without anything else."""
    from llmdistill.cli import output

    output.set_up(quiet=quiet, verbose=verbose)

    from llmdistill.publish.hub import push as upload

    address = upload(
        folder, name, private=not public, revision=revision, create_pr=create_pr, message=message
    )
    if quiet:
        print(address)
    else:
        print(f"Uploaded to {address} ({'public' if public else 'private'}).")
