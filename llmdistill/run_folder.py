"""The folder of a run or a data set: nothing is overwritten by chance, and nothing is lost.

1. `check` says whether a folder may be used, and changes nothing.
2. `claim` makes the folder when the new run begins to write.  To overwrite, it moves the old folder
   aside to `<name>.old` and deletes nothing that has results.
3. `discard_old` deletes `<name>.old` when the new run has something to show.

A kill at any point leaves the old folder in its place or at `<name>.old`, and all three steps can
be made again.  With several ranks, one of them makes the steps.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from llmdistill.errors import CheckpointError

RECORD = "recipe.yaml"
# In a folder that `claim` moved aside.  A user may name a backup `<name>.old`, and that one stays.
REPLACED = ".replaced"

logger = logging.getLogger("llmdistill")


def is_used(folder: Path, *, record: str = RECORD) -> bool:
    """Is there anything to lose?  A record alone is of a start that failed, *.new half a file, and
    an empty folder is nothing.
    """
    if not folder.is_dir():
        return folder.exists()
    names = {
        file.name for file in folder.iterdir() if file.suffix != ".new" and not _is_empty(file)
    }
    return bool(names - {record, REPLACED})


def _is_empty(file: Path) -> bool:
    return file.is_dir() and not any(file.iterdir())


def check(
    folder: Path, *, resume: bool, overwrite: bool, record: str = RECORD, noun: str = "run"
) -> None:
    """Raises CheckpointError if a folder may not be used like this; changes nothing.

    `record` is the file that a folder must hold to be resumed or overwritten; `noun` is what the
    errors call its content.
    """
    if resume and overwrite:
        raise CheckpointError(
            f"pass resume to go on with the {noun} in {folder}, or pass overwrite to replace it, "
            "but not both"
        )
    holds_one = (folder / record).is_file()
    if resume and not holds_one:
        raise CheckpointError(f"{folder} holds no {noun} to resume")
    if not is_used(folder, record=record) or resume:
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder} is not empty. Pass resume to go on with it, pass overwrite to replace it, "
            "or choose another folder (output=...)."
        )
    if not holds_one:
        raise CheckpointError(f"{folder} holds no {noun}, so it is not overwritten: move it away")
    _require_no_backup(folder)


def claim(folder: Path, *, overwrite: bool, results: Sequence[str], record: str = RECORD) -> None:
    """Makes the folder of a run that begins to write; with `overwrite`, the old one moves aside.

    `results` are names or patterns of what only a run with something to show has.  An old
    folder without any is deleted if `<name>.old` is there already: that one is worth more.
    """
    if overwrite and is_used(folder, record=record):
        _require_no_backup(folder)
        old = old_folder(folder)
        if old.exists() and any(any(folder.glob(name)) for name in results):
            _delete(old, last=REPLACED)
        if old.exists():
            _delete(folder, last=record)
        else:
            _move_aside(folder, old)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPLACED).unlink(missing_ok=True)  # of a kill just before a folder was moved


def discard_old(folder: Path) -> None:
    """Deletes what `claim` moved aside for this folder, if there is such a folder."""
    old = old_folder(folder)
    if old.is_dir() and _was_replaced(old):
        _delete(old, last=REPLACED)


def hint(folder: Path) -> str:
    """Where the folder is that was moved aside, as the end of a message; "" if there is none."""
    old = old_folder(folder)
    return f". What was there before is kept in {old}." if old.is_dir() else ""


def old_folder(folder: Path) -> Path:
    """Where a folder that is overwritten is kept: next to it, as `<name>.old`."""
    place = folder.resolve()
    return place.with_name(f"{place.name}.old")


def _was_replaced(old: Path) -> bool:
    """Did `claim` move this folder aside?  An empty one is left by a deletion that was killed."""
    return (old / REPLACED).is_file() or _is_empty(old)


def _require_no_backup(folder: Path) -> None:
    old = old_folder(folder)
    if old.exists() and not _was_replaced(old):
        raise CheckpointError(
            f"{old} was not made by overwriting, and {folder} would be moved there: rename it first"
        )


def _move_aside(folder: Path, old: Path) -> None:
    logger.info("%s is kept as %s until the new one has something to show", folder, old)
    try:
        (folder / REPLACED).touch()
        folder.resolve().rename(old)
    except OSError as error:  # such as a mounted volume
        raise CheckpointError(
            f"cannot move {folder} to {old}: {error}. Empty it, or choose another folder."
        ) from error


def _delete(folder: Path, *, last: str) -> None:
    """Deletes a folder; the file by which it is known goes last, so that a kill changes nothing."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == last):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()
    folder.resolve().rmdir()
