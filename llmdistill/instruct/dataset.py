"""The files of a finished dataset: JSON lines and Parquet, in two splits.

train.jsonl  train.parquet          rows to train on
test.jsonl   test.parquet           rows to evaluate on, chosen by a hash of their text
README.md                           dataset card: how the rows were made, and their intended use
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdistill.instruct.records import read_whole_lines, replace_lines
from llmdistill.models.thinking import TAGS, THINKING

SPLITS = ("train", "test")
FORMER_SPLITS = ("held",)  # name of `test` before 0.1.0; such files are deleted as outdated


def write_splits(
    folder: Path,
    *,
    format: str,
    test_share: float,
    keeps_thinking: bool = True,
    images: str | None = None,
) -> dict[str, int]:
    """Write the files of each split from rows.jsonl, and return the number of rows in each split.

    `format` is a key of `ROW_FORMATS`, and `images` the column with the images of a question.
    Splits without rows are left out.
    """
    import pyarrow
    import pyarrow.parquet

    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    found = list(read_whole_lines(folder / "rows.jsonl"))
    shares = [_share(row, images) for row in found]
    bound = _bound(shares, test_share)
    for row, share in zip(found, shares, strict=True):
        name = "test" if share < bound else "train"
        thinking, context = row.pop("thinking", ""), row.pop("context", [])
        made = ROW_FORMATS[format](row, thinking if keeps_thinking else "", context)
        splits[name].append(made)
    # A resumed run may change `test_share` or `format`, so no file of an earlier run may remain.
    for name in (*SPLITS, *FORMER_SPLITS):
        for old in folder.glob(f"{name}.*"):
            old.unlink()
    for name, rows in splits.items():
        if rows:
            replace_lines(folder / f"{name}.jsonl", rows)
            # Written under another name and renamed, so that a kill leaves no half file.
            fresh = folder / f"{name}.parquet.new"
            columns = dict.fromkeys(key for row in rows for key in row)  # some rows have more
            table = {key: [row.get(key) for row in rows] for key in columns}
            pyarrow.parquet.write_table(pyarrow.table(table), fresh)
            fresh.replace(folder / f"{name}.parquet")
    return {name: len(rows) for name, rows in splits.items() if rows}


def _as_messages(
    row: Mapping[str, Any], thinking: str, context: list[dict[str, Any]]
) -> dict[str, Any]:
    given = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    asked = [*context, {"role": "user", "content": given}]
    answer = {"role": "assistant", "content": row["output"]}
    if thinking:
        answer[THINKING[0]] = thinking
    texts = ("instruction", "input", "output", "rejected")
    kept = {k: v for k, v in row.items() if k not in texts}
    if "rejected" in row:  # a pair for preference optimisation, in the layout of TRL
        other = {"role": "assistant", "content": row["rejected"]}
        pair = {"prompt": asked, "chosen": [answer], "rejected": [other]}
        return {"id": kept.pop("id"), **pair, **kept}
    messages = [*asked, answer] if row["output"] else asked  # or a question alone
    return {"id": kept.pop("id"), "messages": messages, **kept}


def _as_alpaca(
    row: Mapping[str, Any], thinking: str, context: list[dict[str, Any]]
) -> dict[str, Any]:
    made = dict(row)
    if thinking:
        opening, closing = TAGS[0]
        made["output"] = f"{opening}\n{thinking}\n{closing}\n\n{row['output']}"
    system = [one["content"] for one in context if one["role"] == "system"]
    turns = [one["content"] for one in context if one["role"] != "system"]
    if "rejected" in row:  # a pair for preference optimisation
        made["chosen"] = made.pop("output")
    if system:
        made["system"] = "\n\n".join(system)
    if turns:
        made["history"] = [list(pair) for pair in zip(turns[::2], turns[1::2], strict=True)]
    return made


def _share(row: Mapping[str, Any], images: str | None = None) -> float:
    """Return a number in [0, 1) that depends only on the question.

    All rows with the same question, whatever its case, spaces and punctuation, therefore go into
    the same split.  The question of a conversation is its first one.
    """
    said = [one["content"] for one in row.get("context", []) if one["role"] == "user"]
    question = said[0] if said else f"{row['instruction']} {row['input']}"
    text = unicodedata.normalize("NFKC", question).casefold()
    parts = re.findall(r"\w+", text) or [text]  # a question can consist of signs
    # The same question about another image is another question.
    parts += row.get(images, []) if images else []
    # 12 hex digits are 48 bits, which a float holds exactly, so the result is below 1.
    return int(hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12], 16) / 16**12


def _bound(shares: Sequence[float], test_share: float) -> float:
    """Return the number below which a question is in `test`.

    It is `test_share`, except in a small dataset that would have no row in one of the splits: with
    two or more questions, each split has at least one.
    """
    ordered = sorted(set(shares))
    if not test_share or len(ordered) < 2:
        return 0.0
    # Below the second number there is one question, and from the last one on there is one.
    return min(max(test_share, ordered[1]), ordered[-1])


Format = Callable[[Mapping[str, Any], str, list[dict[str, Any]]], dict[str, Any]]

ROW_FORMATS: dict[str, Format] = {"messages": _as_messages, "alpaca": _as_alpaca}
