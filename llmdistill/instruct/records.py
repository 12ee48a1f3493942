"""Files of JSON lines that survive being killed anywhere."""

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
    """The lines of a file that were written whole; nothing where there is no file."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number + 1} is damaged: {error}. Restore the file.") from None


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """All of them on disk, or (killed) the first of them and part of one."""
    if not lines:
        return
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A file with these lines, or the one that was there."""
    replace_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def replace_text(path: Path, text: str) -> None:
    """A file with this text, or the one that was there."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def drop_half_line(path: Path) -> None:
    """Ends a file after its last whole line, and says so where that takes something away."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        logger.warning("%s ended in an incomplete line, which was dropped", path)
        os.truncate(path, whole)
