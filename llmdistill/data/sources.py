"""Reads rows from files, folders, datasets on the Hub, and the tasks of this package.

    train.jsonl  train.json  train.csv  train.tsv  train.parquet     a file
    folder/                                                          all such files in it, by name
    org/name  org/name:split  org/name:config:split                  a dataset on the Hub
    seed_tasks                                                       175 tasks of this package

Each row comes unchanged, with its place (`train.jsonl:214`).  A row that cannot be read is passed
on as a DataError in place of the row: the code that encodes rows decides whether it stops the run.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmdistill.errors import DataError

SEED_TASKS = "seed_tasks"
HELP = (
    "Give a file (.jsonl, .json, .csv, .tsv, .parquet), a folder of such files, or a dataset of "
    "the Hub as org/name, org/name:split or org/name:config:split."
)

Rows = Iterator[tuple[str, Any]]


def read(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    add: Mapping[str, str] | None = None,
    streaming: bool = False,
) -> Rows:
    """Yield the rows of a source, each with its place.

    `columns` renames fields: {"instruction": "question"} reads the column `question` as
    `instruction`.  `add` are fields that each row gets.  `streaming` reads a Hub dataset without
    storing it first.  Files are never loaded into memory as a whole, except a .json file that is
    one list.  Raises DataError if the source cannot be read; a bad row is yielded as a DataError.
    """
    rows = _rows(source, streaming)
    rows = _renamed(rows, columns) if columns else rows
    return _with_fields(rows, add) if add else rows


def hub_name(source: str) -> str | None:
    """Return the name of the Hub dataset that a source means, or None for one on this machine."""
    # A name with a known suffix is a file even if it does not exist: a typo in a file name should
    # not be looked up on the Hub.
    path = Path(source).expanduser()
    here = source == SEED_TASKS or path.exists() or path.suffix in READERS or path.is_absolute()
    return None if here or source.startswith("./") else source.partition(":")[0]


def _rows(source: str, streaming: bool) -> Rows:
    if source == SEED_TASKS:
        # split("\n") and not splitlines(): JSON strings can contain other line separators.
        lines = files("llmdistill.data").joinpath("seed_tasks.jsonl").read_text(encoding="utf-8")
        return _json_lines(lines.split("\n"), SEED_TASKS)
    if hub_name(source):
        return _hub_rows(source, streaming)
    path = Path(source).expanduser()
    return _folder_rows(path, source) if path.is_dir() else _file_rows(path, source)


def _folder_rows(folder: Path, source: str) -> Rows:
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        import datasets

        yield from _numbered(datasets.load_from_disk(str(folder)), source)
        return
    # A folder of `llmdistill generate`.  Its other split must stay held out, and its records are no
    # rows.
    if (folder / "calls.jsonl").is_file():
        yield from _file_rows(folder / "train.jsonl", source)
        return
    found = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    if not found:
        raise DataError(f"{source}: the folder has no file of type {', '.join(READERS)}. {HELP}")
    for path in found:
        yield from _file_rows(path, str(Path(source) / path.name))


def _file_rows(path: Path, source: str) -> Rows:
    """Yield the rows of one file.  Errors of the whole file name it."""
    if not path.is_file():
        raise DataError(f"no such file: {source}. Check the path.")
    if path.suffix not in READERS:
        raise DataError(f"{source}: this type of file is not supported. {HELP}")
    try:
        yield from READERS[path.suffix](path, source)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not valid UTF-8: {error}. Convert it to UTF-8.") from error


def _read_json_lines(path: Path, source: str) -> Rows:
    # utf-8-sig: files from Windows can start with a byte order mark.  newline="\n": only a line
    # feed ends a row, and U+2028 in a JSON string must not, as it would with `splitlines`.
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        yield from _json_lines(lines, source)


def _read_json(path: Path, source: str) -> Rows:
    """Yield the rows of a .json file, which is one list or has one row per line."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start != "[":
        yield from _read_json_lines(path, source)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not valid JSON: {error}") from error
    yield from _numbered(rows, source)


def _json_lines(lines: Iterable[str], source: str) -> Rows:
    """Yield one row per line that is not blank; a line that is not JSON becomes a DataError."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            row = json.loads(line)
        # RecursionError: deep nesting.  ValueError: bad JSON, or a number of too many digits.
        except (ValueError, RecursionError) as error:
            row = DataError(f"{place}: not valid JSON: {error}")
        yield place, row


def _read_separated(path: Path, source: str) -> Rows:
    """Yield the rows of a table whose first line names the columns.

    All values are text; an empty value is None.
    """
    # The default limit of a field is 131,072 characters, which long answers exceed.
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                place = f"{source}:{reader.line_num}"
                # DictReader collects extra values under the key None, and fills in None for missing
                # ones.
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    wrong = f"{place}: the row does not have the {wanted} columns of the header"
                    yield place, DataError(wrong)
                else:
                    yield place, {name: value or None for name, value in row.items()}
        except csv.Error as error:
            raise DataError(f"{source}:{reader.line_num}: not a valid table: {error}") from error


def _read_parquet(path: Path, source: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        # In batches, so that the file is never in memory as a whole.
        batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1024))
        yield from _numbered((row for batch in batches for row in batch), source)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: not a valid Parquet file: {error}") from error


def _hub_rows(source: str, streaming: bool) -> Rows:
    import datasets

    name, *parts = re.split(r":(?![^\[]*\])", source)  # not the colon of a slice: train[:100]
    split = parts.pop() if parts else "train"
    config = parts[0] if parts else None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"cannot load dataset '{source}': {type(error).__name__}: {error}. {HELP}"
        ) from error
    yield from _numbered(rows, source)


def _numbered(rows: Iterable[Any], source: str) -> Rows:
    """Yield rows with places such as `rows.parquet[3]`, counted from 0."""
    for number, row in enumerate(rows):
        yield f"{source}[{number}]", row


def _with_fields(rows: Rows, add: Mapping[str, str]) -> Rows:
    """Yield rows with further fields.  A row that has one of them already is a DataError."""
    for place, row in rows:
        if not isinstance(row, dict):
            yield place, row
        elif taken := [name for name in add if name in row]:
            wrong = f"'add' of the source sets the field '{taken[0]}', but the row already has it"
            yield place, DataError(f"{place}: {wrong}")
        else:
            yield place, row | dict(add)


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Yield rows with renamed fields; other fields keep their names."""
    for place, row in rows:
        missing = [old for old in columns.values() if isinstance(row, dict) and old not in row]
        if missing:
            has = ", ".join(map(str, row))
            wrong = f"'columns' of the source names the field '{missing[0]}', but the row has {has}"
            yield place, DataError(f"{place}: {wrong}")
        elif isinstance(row, dict):
            kept = {name: value for name, value in row.items() if name not in columns.values()}
            yield place, kept | {new: row[old] for new, old in columns.items()}
        else:
            yield place, row


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".parquet": _read_parquet,
}
