"""The data set that a run leaves: JSON lines and Parquet, in two splits.

train.jsonl  train.parquet          the rows to train on
test.jsonl   test.parquet           those to measure on, chosen by their text
README.md                           how it was made, and what it is good for
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmdistill.instruct.records import read_whole_lines, replace_lines

SPLITS = ("train", "test")
FORMER_SPLITS = ("held",)  # what `test` was called before 0.1.0: its files go when splits come


def write_splits(folder: Path, *, format: str, test_share: float) -> dict[str, int]:
    """Writes the files from rows.jsonl; gives the number of rows of each split that has some."""
    import pyarrow
    import pyarrow.parquet

    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row in read_whole_lines(folder / "rows.jsonl"):
        name = "test" if _share(row) < test_share else "train"
        splits[name].append(ROW_FORMATS[format](row))
    for name in (*SPLITS, *FORMER_SPLITS):
        for old in folder.glob(f"{name}.*"):
            old.unlink()
    for name, rows in splits.items():
        if rows:
            replace_lines(folder / f"{name}.jsonl", rows)
            fresh = folder / f"{name}.parquet.new"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), fresh)
            fresh.replace(folder / f"{name}.parquet")
    return {name: len(rows) for name, rows in splits.items() if rows}


def _as_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    given = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    messages = [
        {"role": "user", "content": given},
        {"role": "assistant", "content": row["output"]},
    ]
    kept = {k: v for k, v in row.items() if k not in ("instruction", "input", "output")}
    return {"id": kept.pop("id"), "messages": messages, **kept}


def _share(row: Mapping[str, Any]) -> float:
    """A number in [0, 1) that depends on what is asked alone: the same question is never in both
    splits.
    """
    text = f"{row['instruction']}\n{row['input']}".lower()
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


ROW_FORMATS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "messages": _as_messages,
    "alpaca": dict,
}
