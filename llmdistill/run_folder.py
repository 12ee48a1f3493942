"""The folder of a run or a dataset: nothing is overwritten by accident, and nothing is lost.

1. `check` raises an error if the folder cannot be used.  It changes nothing.
2. `claim` makes the folder when the new run begins to write.  To overwrite, it moves the old folder
   to `<name>.old`.  It deletes no folder that has results.
3. `discard_old` deletes `<name>.old` when the new run has results.

If a run is killed at any point, the old folder is in its place or at `<name>.old`, and all three
steps can be repeated.  With several ranks, only one of them calls these functions.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdistill.errors import CheckpointError

RECORD = "recipe.yaml"
ROWS = "rows.json"  # a hash of the encoded rows, and the day on which they were encoded first
# Marks a folder that `claim` moved.  A user's own backup may be called `<name>.old` and must stay.
REPLACED = ".replaced"

BEFORE = "before.json"  # what was measured before training
FIGURES = "evaluation.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ANSWERS = "answers.jsonl"
POSITIONS = "positions.jsonl"
MEASURED = (FIGURES, ANSWERS, POSITIONS)  # after training
GOES_ON = ("checkpoints/checkpoint-*", "responses/*/*.arrow")  # what a run can go on from
DAY = "%d %b %Y"

logger = logging.getLogger("llmdistill")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write each row as one line of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file with one JSON object per line; none if there is no file.

    A last line that a kill has cut off is left out.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def is_used(folder: Path, *, record: str = RECORD) -> bool:
    """Whether the folder has anything to lose.

    Records alone come from a start that failed, a *.new file is incomplete, and an empty folder has
    nothing.
    """
    if not folder.is_dir():
        return folder.exists()
    names = {
        file.name for file in folder.iterdir() if file.suffix != ".new" and not _is_empty(file)
    }
    return bool(names - {record, ROWS, BEFORE, REPLACED})


def _is_empty(file: Path) -> bool:
    return file.is_dir() and not any(file.iterdir())


def check(
    folder: Path, *, resume: bool, overwrite: bool, record: str = RECORD, noun: str = "run"
) -> None:
    """Raise CheckpointError if the folder cannot be used in this way.  Changes nothing.

    A folder can be resumed or overwritten only if it has the file `record`.  The errors call its
    content a `noun`.
    """
    if resume and overwrite:
        raise CheckpointError(
            f"pass resume to continue the {noun} in {folder}, or pass overwrite to replace it, "
            "but not both"
        )
    holds_one = (folder / record).is_file()
    if resume and not holds_one:
        raise CheckpointError(f"{folder} has no {noun} to resume. Start one without resume.")
    if not is_used(folder, record=record) or resume:
        return
    if not holds_one:
        raise CheckpointError(
            f"{folder} has files but no {noun}, so it is neither used nor overwritten. Move the "
            "files, or choose another folder (output=...)."
        )
    if not overwrite:
        how = "pass resume" if noun == "dataset" else "set resume=auto"
        raise CheckpointError(
            f"{folder} is not empty. To continue it, {how}; to replace it, pass overwrite; or "
            "choose another folder (output=...)."
        )
    _require_no_backup(folder)


def claim(folder: Path, *, overwrite: bool, results: Sequence[str], record: str = RECORD) -> None:
    """Make the folder of a run that begins to write.  With `overwrite`, move the old folder first.

    `results` are names or patterns of files that only a run with results has.  If `<name>.old`
    exists and the old folder has no results, the old folder is deleted instead of moved.
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
    (folder / REPLACED).unlink(missing_ok=True)  # a kill just before a move leaves it


def discard_old(folder: Path) -> None:
    """Delete the folder that `claim` moved, if there is one."""
    old = old_folder(folder)
    if old.is_dir() and _was_replaced(old):
        _delete(old, last=REPLACED)


def record_rows(folder: Path, rows: str) -> None:
    """Write down the hash of the encoded rows, unless an earlier start of the run has done so."""
    if not (folder / ROWS).is_file():
        day = datetime.date.today().strftime(DAY)
        text = json.dumps({"digest": rows, "encoded_on": day}, indent=2)
        (folder / ROWS).write_text(text + "\n", encoding="utf-8")


def require_same_rows(folder: Path, rows: str) -> None:
    """Raise CheckpointError if a run to resume was started with other rows."""
    try:
        found = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        before, day = found["digest"], found["encoded_on"]
    except (OSError, ValueError, KeyError):  # the run has no such record
        return
    if before != rows:
        raise CheckpointError(
            f"the rows of {folder} are rendered as other tokens than on {day}, when the run was "
            "started. Restore the data, or start again with overwrite. If the chat template writes "
            f"today's date and reads `date_string`, set data.chat_template_kwargs: {{date_string: "
            f"{day}}}."
        )


def old_folder(folder: Path) -> Path:
    """Return the path to which an overwritten folder is moved: `<name>.old` in the same parent."""
    place = folder.resolve()
    return place.with_name(f"{place.name}.old")


def _was_replaced(old: Path) -> bool:
    """Whether `claim` moved this folder.  A deletion that was killed leaves an empty one."""
    return (old / REPLACED).is_file() or _is_empty(old)


def _require_no_backup(folder: Path) -> None:
    old = old_folder(folder)
    if old.exists() and not _was_replaced(old):
        raise CheckpointError(
            f"overwriting moves {folder} to {old}, which exists and was not made by overwriting. "
            "Rename it first."
        )


def _move_aside(folder: Path, old: Path) -> None:
    logger.info("%s is kept as %s until the new run has results", folder, old)
    try:
        (folder / REPLACED).touch()
        folder.resolve().rename(old)
    except OSError as error:  # a mounted volume, for example, cannot be renamed
        raise CheckpointError(
            f"cannot move {folder} to {old}: {error}. Empty it, or choose another folder."
        ) from error


def _delete(folder: Path, *, last: str) -> None:
    """Delete a folder, its file `last` at the end: until then a killed deletion can be repeated."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == last):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()
    folder.resolve().rmdir()
