"""JSON lines files that stay readable if the process is killed at any point."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdistill.errors import DataError

logger = logging.getLogger("llmdistill")


def read_whole_lines(path: Path) -> Iterator[Any]:
    """Yield the complete lines of a file; nothing if the file does not exist.

    Raises DataError for a line that is not JSON.
    """
    if not path.is_file():
        return
    # What follows the last newline is empty, or the part of a line whose writer was killed.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number + 1} is damaged: {error}. Restore the file.") from None


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines and flush them to disk.

    If the process is killed, the file ends with some of the lines, the last one perhaps incomplete.
    """
    if not lines:
        return
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a crash of the machine, not only of the process, loses no line


def replace_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file atomically: after a kill it has either the old content or these lines."""
    replace_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a kill it has either the old content or this text."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def drop_half_line(path: Path) -> None:
    """Remove an incomplete last line from a file, with a warning; a missing file is fine."""
    if not path.is_file():
        return
    # Otherwise the next append would continue the incomplete line, and damage both.
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        logger.warning("%s ended in an incomplete line, which was dropped", path)
        os.truncate(path, whole)
