"""Open files of text, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from llmdistill.errors import DataError


def open_text(path: Path, newline: str) -> TextIO:
    """Open a file, perhaps a compressed one, as UTF-8.

    Files from Windows can start with a byte order mark.  Raises DataError if a package is missing.
    """
    binary = OPENERS[path.suffix](path) if path.suffix in OPENERS else path.open("rb")
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline)


def type_of(path: Path) -> str:
    """Return the suffix that tells how a file is read, without that of its compression."""
    inner = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    return path.suffix if inner == ".parquet" else inner  # compressed tables are not read


def _open_zst(path: Path) -> Any:
    try:
        import zstandard  # type: ignore[import-not-found]
    except ImportError as error:
        raise DataError(
            f"{path}: files of type .zst need a package. Install it with: pip install zstandard"
        ) from error
    return zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
