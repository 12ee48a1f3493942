"""Tells the content of a source from others, so that its encoded rows can be kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import xxhash

from llmdistill.data.sources import (
    SEED_TASKS,
    files_by_split,
    folder_and_split,
    hub_dataset,
    hub_name,
)

READ_AT_ONCE = 2**24  # bytes


def content_of(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    add: Mapping[str, str] | None = None,
) -> str | None:
    """Return a digest of the bytes of a source and of how its fields are read.

    It is None for a source that cannot be read, or whose content is not known without reading it.
    """
    digest = _digest(source)
    if digest is None:
        return None
    return json.dumps([digest, dict(columns or {}), dict(add or {})])


def dataset_content(rows: Any) -> str | None:
    """Return what `datasets` knows the content of a dataset by; None for any other rows."""
    found = getattr(rows, "_fingerprint", None)
    return found if isinstance(found, str) else None


def _digest(source: str) -> str | None:
    if source == SEED_TASKS:
        text = files("llmdistill.data").joinpath("seed_tasks.jsonl").read_bytes()
        return xxhash.xxh3_128_hexdigest(text)
    if hub_name(source):
        return dataset_content(hub_dataset(source))
    path, split = Path(os.path.expanduser(source)), ""
    if not path.exists() and (named := folder_and_split(source)) is not None:
        path, split = named
    if not path.exists():
        return None
    found = xxhash.xxh3_128(split.encode())
    for file in _files(path):
        name = file.name if file == path else os.path.relpath(file, path)
        found.update(f"{name} {file.stat().st_size}".encode())
        with file.open("rb") as opened:
            while block := opened.read(READ_AT_ONCE):
                found.update(block)
    return found.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """Yield the files whose content decides what rows a file or a folder has."""
    if path.is_file():
        yield path
    elif (path / "calls.jsonl").is_file():  # the records of `llmdistill generate` are no rows
        yield from sorted(path.glob("t*.jsonl"))
    elif not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        splits, _ = files_by_split(path.absolute())
        yield from sorted({file for files in splits.values() for file in files})
    else:  # a dataset that was saved with `save_to_disk`
        yield from sorted(one for one in path.rglob("*") if one.is_file())
