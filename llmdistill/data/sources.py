"""Where rows come from: files, folders, data sets of the Hub, and the package's own instructions.

    train.jsonl  train.json  train.csv  train.tsv  train.parquet     a file
    folder/                                                          all such files in it, by name
    org/name  org/name:split  org/name:config:split                  a data set of the Hub
    seed_tasks                                                       175 instructions of our own

A row comes with its place (`train.jsonl:214`), as it is in the file.  One that cannot be read is
handed on as the error that says so: who encodes the rows decides whether that stops the run.
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


def read(source: str, *, columns: Mapping[str, str] | None = None, streaming: bool = False) -> Rows:
    """The rows of a source, each with its place.

    `columns` names fields anew: {"instruction": "question"} reads the column `question` as
    `instruction`.  `streaming` reads a data set of the Hub without storing it first; files are
    never held in memory whole, but for a .json that is one list.
    """
    rows = _rows(source, streaming)
    return _renamed(rows, columns) if columns else rows


def hub_name(source: str) -> str | None:
    """The data set of the Hub that a source names; None for everything on this machine."""
    path = Path(source).expanduser()
    here = source == SEED_TASKS or path.exists() or path.suffix in READERS or path.is_absolute()
    return None if here or source.startswith("./") else source.partition(":")[0]


def _rows(source: str, streaming: bool) -> Rows:
    if source == SEED_TASKS:
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
    if (folder / "calls.jsonl").is_file():  # of `llmdistill generate`: what is held back stays so
        yield from _file_rows(folder / "train.jsonl", source)
        return
    found = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    if not found:
        raise DataError(f"{source}: the folder has no file of type {', '.join(READERS)}. {HELP}")
    for path in found:
        yield from _file_rows(path, str(Path(source) / path.name))


def _file_rows(path: Path, source: str) -> Rows:
    """Errors of a whole file, its encoding among them, in words that name it."""
    if not path.is_file():
        raise DataError(f"no such file: {source}. Check the path.")
    if path.suffix not in READERS:
        raise DataError(f"{source}: this type of file is not supported. {HELP}")
    try:
        yield from READERS[path.suffix](path, source)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not valid UTF-8: {error}. Convert it to UTF-8.") from error


def _read_json_lines(path: Path, source: str) -> Rows:
    # newline="\n": JSON strings may hold U+2028 and its kin, which end no line in a file.
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        yield from _json_lines(lines, source)


def _read_json(path: Path, source: str) -> Rows:
    """A list of rows, or one row a line."""
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
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = DataError(f"{place}: not valid JSON: {error}")
        yield place, row


def _read_separated(path: Path, source: str) -> Rows:
    """A table with a first line of column names.  All values are text; an empty one is none."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                place = f"{source}:{reader.line_num}"
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
    for number, row in enumerate(rows):
        yield f"{source}[{number}]", row


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
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
