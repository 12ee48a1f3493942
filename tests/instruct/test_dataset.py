"""The files of a dataset's splits."""

from __future__ import annotations

from llmdistill.instruct.dataset import write_splits
from llmdistill.instruct.records import read_whole_lines, replace_lines


def rows(number):
    return [
        {"id": f"{i}-0", "instruction": f"Say {i}.", "input": "", "output": "So."}
        for i in range(number)
    ]


def test_files_of_a_split_that_is_no_more_are_removed(tmp_path):
    """Those of `held`, as `test` was called before, too."""
    replace_lines(tmp_path / "rows.jsonl", rows(20))
    for name in ("held.jsonl", "held.parquet", "test.jsonl", "test.parquet"):
        (tmp_path / name).write_text("old")
    assert write_splits(tmp_path, format="messages", test_share=0.0) == {"train": 20}
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"rows.jsonl", "train.jsonl", "train.parquet"}


def test_a_question_is_always_in_the_same_split(tmp_path):
    replace_lines(tmp_path / "rows.jsonl", rows(40))
    sizes = write_splits(tmp_path, format="alpaca", test_share=0.3)
    assert sizes["train"] + sizes["test"] == 40
    test = {row["id"] for row in read_whole_lines(tmp_path / "test.jsonl")}
    replace_lines(tmp_path / "rows.jsonl", [row | {"output": "Else."} for row in rows(50)])
    write_splits(tmp_path, format="messages", test_share=0.3)
    again = {row["id"] for row in read_whole_lines(tmp_path / "test.jsonl")}
    assert test == {one for one in again if int(one.split("-")[0]) < 40}
