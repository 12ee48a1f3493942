"""Encoded rows in Arrow tables: a row becomes an object only when it is read.

N = rows.  A token takes 4 bytes, and a table in a file is memory-mapped, so that the memory of a
process does not grow with its rows.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from llmdistill.data.formats import Message

BLOCK = 1024  # rows that become objects at a time


@dataclass(frozen=True)
class Row:
    """One encoded row.

    `row_id` is its place among all examples that were read, dropped ones too, from 0.  It keys the
    random draws of the row.  `response_ids` include the end token unless the response was cut.
    `columns` are the fields of the row that the teacher reads, and `teacher_prompt_ids` is the
    prompt with the context that only the teacher sees; None if it reads the same prompt.
    `messages` are those of the prompt, if the teacher renders them itself.  `is_text` marks plain
    text, whose prompt is its first token alone.
    """

    row_id: int
    prompt_ids: list[int]
    response_ids: list[int] | None
    columns: dict[str, Any] = field(default_factory=dict)
    teacher_prompt_ids: list[int] | None = None
    messages: tuple[Message, ...] = ()
    is_text: bool = False


IDS = ("prompt_ids", "response_ids", "teacher_prompt_ids")
SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        *((name, pa.list_(pa.int32())) for name in IDS),
        ("is_text", pa.bool_()),
        ("more", pa.string()),  # columns and messages as JSON; null for rows without them
        ("question", pa.binary(16)),  # a digest of `question`, by which rows are held back
    ]
)


def question(row: Row) -> bytes:
    """Return a digest of what makes two rows the same question: the prompt, and a row's images.

    Plain text has no prompt, so all of it counts.
    """
    text = (row.response_ids or ()) if row.is_text else ()
    images = repr(row.columns) if row.messages else ""  # only a teacher of images reads messages
    found = xxhash.xxh3_128(array("q", [*row.prompt_ids, *text]).tobytes())
    found.update(images.encode("utf-8", "surrogatepass"))
    return found.digest()


def to_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    """Return rows as one Arrow batch.  Raises TypeError for a column that is not JSON."""
    columns = {
        "row_id": [row.row_id for row in rows],
        **{name: [getattr(row, name) for row in rows] for name in IDS},
        "is_text": [row.is_text for row in rows],
        "more": [_more(row) for row in rows],
        "question": [question(row) for row in rows],
    }
    return pa.record_batch(columns, schema=SCHEMA)


def to_table(rows: Iterable[Row]) -> pa.Table:
    """Return rows as an Arrow table in memory."""
    held = list(rows)
    blocks = [held[start : start + BLOCK] for start in range(0, len(held), BLOCK)]
    return pa.Table.from_batches([to_batch(block) for block in blocks], schema=SCHEMA)


def _more(row: Row) -> str | None:
    return json.dumps([row.columns, list(row.messages)]) if row.columns or row.messages else None


def _to_row(values: dict[str, Any], row_id: int) -> Row:
    columns, messages = json.loads(values["more"]) if values["more"] else ({}, ())
    return Row(
        row_id,
        values["prompt_ids"],
        values["response_ids"],
        columns,
        values["teacher_prompt_ids"],
        tuple(messages),
        values["is_text"],
    )


class Rows(Sequence[Row]):
    """Some rows of a table, in any order.

    Args:
        table: A table of SCHEMA.
        places_N: Where each row is in the table; None takes all of them.
        row_ids_N: The ids of the rows; None takes those of the table.
    """

    def __init__(
        self,
        table: pa.Table,
        places_N: np.ndarray | None = None,
        row_ids_N: np.ndarray | None = None,
    ) -> None:
        self.table = table
        self.places_N = np.arange(len(table)) if places_N is None else places_N
        if row_ids_N is None:
            row_ids_N = table.column("row_id").to_numpy()[self.places_N]
        self.row_ids_N = row_ids_N

    @classmethod
    def of(cls, rows: Rows | Iterable[Row]) -> Rows:
        """Return rows as they are, or put row objects into a table."""
        return rows if isinstance(rows, Rows) else cls(to_table(rows))

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of several tables, one after another."""
        starts = np.cumsum([0, *(len(part.table) for part in parts)])
        places = [part.places_N + start for part, start in zip(parts, starts, strict=False)]
        return cls(
            pa.concat_tables([part.table for part in parts]),
            np.concatenate(places),
            np.concatenate([part.row_ids_N for part in parts]),
        )

    def take(self, which: np.ndarray) -> Rows:
        """Return the rows at these indices, or those that a mask marks."""
        return Rows(self.table, self.places_N[which], self.row_ids_N[which])

    def renumbered(self, row_ids_N: np.ndarray) -> Rows:
        """Return the same rows with other ids."""
        return Rows(self.table, self.places_N, row_ids_N)

    def __len__(self) -> int:
        return len(self.places_N)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return list(self.take(np.arange(len(self))[index]))
        place, row_id = int(self.places_N[index]), int(self.row_ids_N[index])
        read = ("is_text", "more", *IDS)
        return _to_row({name: self.table.column(name)[place].as_py() for name in read}, row_id)

    def __iter__(self) -> Iterator[Row]:
        for start, block in self._blocks():
            for number, values in enumerate(block.to_pylist()):
                yield _to_row(values, int(self.row_ids_N[start + number]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def _blocks(self) -> Iterator[tuple[int, pa.Table]]:
        """Yield the rows in tables of BLOCK rows, each with the number of its first row.

        `Table.take` would copy whole columns for each block, so rows are taken batch by batch.
        """
        batches = self.table.to_batches()
        starts = np.cumsum([0, *(len(batch) for batch in batches)])
        for start in range(0, len(self), BLOCK):
            places = self.places_N[start : start + BLOCK]
            owner = np.searchsorted(starts, places, side="right") - 1
            parts = []
            for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(owner)) + 1):
                number = int(owner[run[0]])
                parts.append(batches[number].take(pa.array(places[run] - starts[number])))
            yield start, pa.Table.from_batches(parts, self.table.schema)

    def lengths(self, name: str) -> np.ndarray:
        """Return the tokens of each row in a column of ids, 0 if a row has none: (N,)."""
        counted = pc.fill_null(pc.list_value_length(self.table.column(name)), 0)
        return counted.to_numpy()[self.places_N]

    def lacks(self, name: str) -> bool:
        """Whether a row has nothing in a column of ids."""
        return bool(pc.is_null(self.table.column(name)).to_numpy()[self.places_N].any())

    @property
    def questions_N(self) -> np.ndarray:
        """A digest of the question of each row: (N,)."""
        digests = b"".join(self.table.column("question").to_pylist())
        return np.frombuffer(digests, dtype="S16")[self.places_N]

    def digest(self) -> str:
        """Return a hash of the ids, tokens and columns of all rows."""
        found = hashlib.sha256()
        for start, block in self._blocks():
            found.update(np.ascontiguousarray(self.row_ids_N[start : start + BLOCK]).tobytes())
            for name in IDS:
                column = block.column(name).combine_chunks()
                lengths = pc.fill_null(pc.list_value_length(column), -1)
                found.update(lengths.to_numpy(zero_copy_only=False).tobytes())
                found.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
            found.update(repr(block.column("more").to_pylist()).encode())
        return found.hexdigest()
