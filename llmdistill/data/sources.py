"""Reads rows from files, folders, datasets on the Hub, and the tasks of this package.

    train.jsonl  train.json  train.csv  train.tsv  train.parquet     a file, perhaps as .gz or .zst
    folder/  folder:split                                            the files of a split in it
    org/name  org/name:split  org/name:config:split                  a dataset on the Hub
    seed_tasks                                                       175 tasks of this package

Each row comes unchanged, with its place (`train.jsonl:214`).  A row that cannot be read is passed
on as a DataError in place of the row: the code that encodes rows decides whether it stops the run.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmdistill.data.compressed import OPENERS, open_text, type_of
from llmdistill.data.formats import FORMATS
from llmdistill.errors import DataError

logger = logging.getLogger("llmdistill")

SEED_TASKS = "seed_tasks"
HELP = (
    "Give a file (.jsonl, .json, .csv, .tsv or .parquet, all but the last also as .gz, .bz2, .xz "
    "or .zst), a folder of such files, or a dataset of the Hub as org/name, org/name:split or "
    "org/name:config:split."
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
    path = Path(os.path.expanduser(source))
    here = source == SEED_TASKS or path.exists() or type_of(path) in READERS or path.is_absolute()
    is_file = here or source.startswith("./") or folder_and_split(source) is not None
    is_file = is_file or "://" in source or source.partition(":")[0].count("/") > 1
    return None if is_file else source.partition(":")[0]


def folder_and_split(source: str) -> tuple[Path, str] | None:
    """Return the parts of `folder:split`, or None if there is no such folder."""
    name, colon, split = source.rpartition(":")
    folder = Path(os.path.expanduser(name))
    return (folder, split) if colon and name and folder.is_dir() else None


def _rows(source: str, streaming: bool) -> Rows:
    if source == SEED_TASKS:
        # split("\n") and not splitlines(): JSON strings can contain other line separators.
        lines = files("llmdistill.data").joinpath("seed_tasks.jsonl").read_text(encoding="utf-8")
        return _json_lines(lines.split("\n"), SEED_TASKS)
    if hub_name(source):
        return _numbered(map(without_nulls, hub_dataset(source, streaming=streaming)), source)
    path = Path(os.path.expanduser(source))
    if not path.exists() and (named := folder_and_split(source)) is not None:
        return _folder_rows(named[0], source.rpartition(":")[0], named[1])
    return _folder_rows(path, source, None) if path.is_dir() else _file_rows(path, source)


def _folder_rows(folder: Path, source: str, split: str | None) -> Rows:
    """Yield the rows of one split of a folder: the one that is named, or `train`."""
    if (folder / "dataset_dict.json").is_file():  # of DatasetDict.save_to_disk
        known = [path.parent.name for path in folder.glob("*/state.json")]
        name = _chosen(known, split, source)
        folder, source, split = folder / name, str(Path(source) / name), None
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        import datasets

        if split is not None:
            raise DataError(f"{source}: the folder is one saved dataset without splits.")
        saved = datasets.load_from_disk(str(folder))
        yield from _numbered(map(without_nulls, saved), source)
        return
    # A folder of `llmdistill generate`: its records are no rows.
    if (folder / "calls.jsonl").is_file():
        known = [path.stem for path in folder.glob("t*.jsonl")]
        name = _chosen(known, split, source)
        yield from _file_rows(folder / f"{name}.jsonl", source)
        return
    folder = Path(os.path.abspath(folder))  # links stay, because their targets may have no suffix
    found, left = files_by_split(folder)
    if not found:
        raise DataError(f"{source}: the folder has no file of type {', '.join(READERS)}. {HELP}")
    files = found[_chosen(list(found), split, source, left)]
    if left:
        logger.warning("%s: files that are not read: %s", source, ", ".join(left))
    for path in files:
        yield from _file_rows(path, str(Path(source) / path.relative_to(folder)))


def files_by_split(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of each split of a folder, as `datasets.load_dataset` sorts them by name.

    Hidden files are left alone.  The names that follow are those of files that belong to no split,
    or whose type is not known.
    """
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    splits: dict[str, list[Path]] = {}
    place = glob.escape(str(folder))  # a name such as "rows [2]" is no pattern
    try:
        patterns = get_data_patterns(place)
    except EmptyDatasetError:
        return {}, []
    for split, several in patterns.items():
        files: set[Path] = set()
        for pattern in several:
            with contextlib.suppress(FileNotFoundError):  # no file fits this pattern
                files |= {Path(name) for name in resolve_pattern(pattern, place)}
        known = sorted(path for path in files if type_of(path) in READERS)
        if known:
            splits[str(split)] = known
    taken = {path for files in splits.values() for path in files}
    others = {path for path in folder.iterdir() if path.is_file() and path.name[0] not in "._"}
    left = sorted(path.name for path in others - taken if path.suffix not in NO_ROWS)
    return splits, left


def _chosen(known: Sequence[str], split: str | None, source: str, left: Sequence[str] = ()) -> str:
    """Return the split to read.  Raises DataError if there is none of that name."""
    wanted = split or "train"
    if wanted not in known:
        first = sorted(known)[0] if known else "train"
        others = f" The name of {', '.join(left)} tells no split; give the file itself." * bool(
            left
        )
        raise DataError(
            f"{source}: there is no split '{wanted}'; the folder has "
            f"{', '.join(sorted(known)) or 'none'}. Name one, as in {source}:{first}.{others}"
        )
    return wanted


def _file_rows(path: Path, source: str) -> Rows:
    """Yield the rows of one file.  Errors of the whole file name it."""
    if not path.is_file():
        raise DataError(f"no such file: {source}. Check the path.")
    if type_of(path) not in READERS:
        raise DataError(f"{source}: this type of file is not supported. {HELP}")
    try:
        yield from READERS[type_of(path)](path, source)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not valid UTF-8: {error}. Convert it to UTF-8.") from error
    except DataError:
        raise
    except Exception as error:  # each compression library raises other errors
        if path.suffix not in OPENERS:
            raise
        raise DataError(f"{source}: the compressed file is damaged: {error}") from error


def _read_json_lines(path: Path, source: str) -> Rows:
    # newline="\n": only a line feed ends a row, and U+2028 in a JSON string must not, as it would
    # with `splitlines`.
    with open_text(path, "\n") as lines:
        yield from _json_lines(lines, source)


def _read_json(path: Path, source: str) -> Rows:
    """Yield the rows of a .json file, which is one list or has one row per line."""
    with open_text(path, "\n") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        first_line = start + file.readline()
    if start == "{":
        _refuse_an_object(path, source, first_line)
        if (row := _only_row(path, first_line)) is not None:
            yield from _numbered([row], source)
            return
    if start != "[":
        yield from _read_json_lines(path, source)
        return
    try:
        with open_text(path, "\n") as file:
            rows = json.load(file, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not valid JSON: {error}") from error
    yield from _numbered(rows, source)


def _refuse_an_object(path: Path, source: str, first_line: str) -> None:
    """Raise DataError if the whole file is one object with the rows in it."""
    if _parsed(first_line) is not None:  # one row per line, unless the only line holds all rows
        with open_text(path, "\n") as file:
            file.readline()
            if file.read(1):
                return
    with open_text(path, "\n") as file:
        whole = _parsed(file.read())
    if isinstance(whole, dict) and not any(key in whole for key, _ in FORMATS.values()):
        lists = [name for name, value in whole.items() if isinstance(value, list)]
        where = f" They seem to be in '{lists[0]}'." if lists else ""
        raise DataError(
            f"{source}: the rows are not at the top of this file, which is one object with the "
            f"fields {', '.join(whole)}.{where} Save the list alone, or one row per line."
        )


def _only_row(path: Path, first_line: str) -> dict[str, Any] | None:
    """Return the row of a file that is one object over several lines, or None."""
    if _parsed(first_line) is not None:
        return None
    with open_text(path, "\n") as file:
        whole = _parsed(file.read())
    return whole if isinstance(whole, dict) else None


def _parsed(text: str) -> Any:
    """Return the value of a JSON text, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object.  Raises ValueError for a key that occurs twice: one would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' occurs twice in one object")
    return made


def _json_lines(lines: Iterable[str], source: str) -> Rows:
    """Yield one row per line that is not blank; a line that is not JSON becomes a DataError."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
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
    options: dict[str, Any] = {"delimiter": ",", "strict": True}
    if type_of(path) == ".tsv":
        options["delimiter"] = "\t"
        if not _is_valid(path, options):  # plain TSV, in which a quotation mark has no meaning
            options |= {"quoting": csv.QUOTE_NONE, "strict": False}
    with open_text(path, "") as file:
        reader = csv.DictReader(file, **options)
        try:
            names = list(reader.fieldnames or ())
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{source}: the header names the column '{twice[0]}' twice")
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


def _is_valid(path: Path, options: Mapping[str, Any]) -> bool:
    """Whether a file is a valid table in which fields can be quoted."""
    with open_text(path, "") as file:
        try:
            return all(True for _ in csv.reader(file, **options))
        except csv.Error:
            return False


def _read_parquet(path: Path, source: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        # In batches, so that the file is never in memory as a whole.
        batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1024))
        rows = (without_nulls(row) for batch in batches for row in batch)
        yield from _numbered(rows, source)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: not a valid Parquet file: {error}") from error


def hub_dataset(source: str, *, streaming: bool = False) -> Any:
    """Return a dataset of the Hub.  Raises DataError if it cannot be loaded."""
    import datasets

    name, *parts = re.split(r":(?![^\[]*\])", source)  # not the colon of a slice: train[:100]
    split = parts.pop() if parts else "train"
    config = parts[0] if parts else None
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"cannot load dataset '{source}': {type(error).__name__}: {error}. {HELP}"
        ) from error


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table without null fields in its objects.

    A table fills in the fields that objects of other rows have.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(one) for name, one in value.items() if one is not None}
        return [clean(one) for one in value] if isinstance(value, list) else value

    return {name: clean(value) for name, value in row.items()}


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


NO_ROWS = (".md", ".txt", ".yaml", ".yml", ".py", ".gitattributes", "")
READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".parquet": _read_parquet,
}
