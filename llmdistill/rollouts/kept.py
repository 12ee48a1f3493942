"""Responses that are written once and kept: files of a folder, which all ranks read.

N = responses, B = sequences.

A file is an Arrow table of responses that were written together.  It appears whole, under a name
that no other file has, and is never changed, so a run that is killed loses at most the batch that
was being written.  Files are memory-mapped.  What a process holds of each response is its key and
its place, 16 bytes.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from accelerate import PartialState
from torch import Tensor, nn

from llmdistill.errors import CheckpointError
from llmdistill.models.digest import digest_of, some_numbers

logger = logging.getLogger("llmdistill")

SCHEMA = pa.schema([("key", pa.uint64()), ("ids", pa.list_(pa.int32()))])
ABOUT = "about.json"  # what the responses of a folder depend on, for a reader
# Attributes of teachers that decide what they write: where a model is and how it is asked, and
# which row goes to which teacher or has which images.
SETTINGS = (
    *("url", "model", "chat_template_kwargs", "extra_body", "place", "seen", "template_options"),
)


class KeptResponses:
    """Responses by key, in memory or in a folder.

    Args:
        folder: Where the files are.  It is created at the first `add`.  None keeps the responses in
            memory.
        about: What all of them depend on.  It is recorded in the folder.
    """

    def __init__(self, folder: Path | None = None, about: Mapping[str, Any] | None = None) -> None:
        self.folder, self.about = folder, about or {}
        self._read: set[str] = set()
        self._table = SCHEMA.empty_table()
        # Sorted keys and, for each, its place in the table.
        self._keys_N = np.empty(0, np.uint64)
        self._places_N = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._keys_N)

    def missing(self, keys_B: np.ndarray) -> np.ndarray:
        """Return the indices of the keys that have no response; of equal keys, the first one."""
        unknown_B = ~self._has(keys_B)
        first_B = np.zeros(len(keys_B), bool)
        first_B[np.unique(keys_B, return_index=True)[1]] = True
        return np.flatnonzero(unknown_B & first_B)

    def responses(self, keys_B: np.ndarray) -> list[list[int]]:
        """Return the token ids of responses, all of which must be there."""
        places_B = self._places_N[np.searchsorted(self._keys_N, keys_B)]
        column = self._table.column("ids")
        return [column[int(place)].as_py() for place in places_B]

    def add(self, keys_B: np.ndarray, responses: Sequence[Sequence[int]]) -> None:
        """Keep more responses, under keys that are not known yet."""
        table = pa.table([pa.array(keys_B), list(responses)], schema=SCHEMA)
        if self.folder is None or not len(keys_B):
            return self._take(table)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ABOUT).is_file():
            _write_whole(self.folder / ABOUT, json.dumps(self.about, indent=2).encode() + b"\n")
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as file:
            file.write_table(table)
        # A rank adds a key only once, so no file has this name.
        path = self.folder / f"{int(keys_B[0]):016x}-{PartialState().process_index}.arrow"
        _write_whole(path, sink.getvalue())
        return self._take_file(path)

    def refresh(self) -> None:
        """Read the files that other processes have written since the last call."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("*.arrow")):  # all ranks read them in the same order
            if path.name not in self._read:
                self._take_file(path)

    def _has(self, keys_B: np.ndarray) -> np.ndarray:
        places_B = np.searchsorted(self._keys_N, keys_B)
        found_B = places_B < len(self._keys_N)
        found_B[found_B] = self._keys_N[places_B[found_B]] == keys_B[found_B]
        return found_B

    def _take_file(self, path: Path) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().cast(SCHEMA)
        except pa.ArrowException as error:
            raise CheckpointError(
                f"{path} is damaged: {error}. Delete it; its responses are then written again."
            ) from error
        self._read.add(path.name)
        self._take(table)

    def _take(self, table: pa.Table) -> None:
        keys_B = table.column("key").to_numpy()
        new_B = self.missing(keys_B)
        order_B = new_B[keys_B[new_B].argsort()]
        at_B = np.searchsorted(self._keys_N, keys_B[order_B])
        self._places_N = np.insert(self._places_N, at_B, len(self._table) + order_B)
        self._keys_N = np.insert(self._keys_N, at_B, keys_B[order_B])
        self._table = pa.concat_tables([self._table, table])


def response_key(row_id: int, sample: int, prompt_ids: Sequence[int]) -> int:
    """Return the key of a response.

    The prompt is part of it, so that a row that was changed never gets the response of another.
    """
    return xxhash.xxh3_64_intdigest(array("q", [row_id, sample, *prompt_ids]).tobytes())


def identity(writer: Any) -> str:
    """Return a digest that tells a teacher from others, by its class, models and settings.

    Of each weight a few numbers are read.  `writer` can also be a model or a list of weights.
    """
    digest = xxhash.xxh3_64()
    for part in _identifying(writer):
        digest.update(part)
    return digest.hexdigest()


def _identifying(value: Any) -> Iterator[bytes]:
    if isinstance(value, nn.Module):
        yield digest_of(value)
    elif isinstance(value, Tensor):
        yield some_numbers(value)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _identifying(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _identifying(one)
    elif hasattr(value, "judge") or hasattr(value, "write"):
        settings = {name: vars(value).get(name) for name in SETTINGS if name in vars(value)}
        if isinstance(settings.get("model"), nn.Module):
            settings.pop("model")
        ends = sorted(getattr(value, "ends", ()))
        yield f"{type(value).__name__} {settings} {ends}".encode("utf-8", "surrogatepass")
        for one in vars(value).values():
            yield from _identifying(one)


def _write_whole(path: Path, data: Any) -> None:
    """Write a file that is either there with all of its data, or not there."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
