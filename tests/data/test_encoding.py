"""Encoded rows in files: the same by any number of processes, found again, never stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llmdistill.data import encoding, table
from llmdistill.data.collate import PromptDataset
from llmdistill.data.content import content_of, dataset_content
from llmdistill.data.encoding import cache_folder, encode_in_memory, encode_source
from llmdistill.data.sources import read
from llmdistill.data.table import Row, Rows
from llmdistill.data.validate import Rules
from llmdistill.errors import DataError
from tests import toy
from tests.support.files import write_jsonl

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_chunks(monkeypatch):
    """Processes from the ninth row on, with four rows at a time."""
    monkeypatch.setattr(encoding, "CHUNK", 4)
    monkeypatch.setattr(encoding, "IN_PROCESS", 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


def conversations(number: int) -> list[dict]:
    """Rows with one to three answers; some are too long, and some are malformed."""
    rows = []
    for place in range(number):
        turns = [
            {"role": role, "content": f"{role} {place} " + "word " * (place * 7 % 11)}
            for _ in range(1 + place % 3)
            for role in ("user", "assistant")
        ]
        rows.append({"messages": turns} if place % 9 else {"messages": "none", "topic": "x"})
    return rows


def source(rows) -> list:
    return [(f"x:{place}", row) for place, row in enumerate(rows)]


RULES = Rules(every_turn=True, skip_bad=True, max_prompt_tokens=150, max_response_tokens=40)


def test_processes_encode_the_same_rows_in_the_same_order(tokenizer, small_chunks):
    rows = source(conversations(60))
    alone = encode_in_memory(rows, tokenizer, RULES)
    together = encode_source(rows, "some", tokenizer, RULES)
    assert together.counts == alone.counts
    assert alone.counts.bad
    assert alone.counts.more_answers
    assert alone.counts.long_prompts_dropped
    assert alone.counts.responses_truncated
    assert Rows(together.table) == Rows(alone.table)
    ids = Rows(alone.table).row_ids_N.tolist()
    assert ids == sorted(ids)
    assert max(ids) >= len(ids)  # dropped rows have ids, too


@pytest.mark.parametrize("rule", ["skip_bad", "long_prompts"])
def test_errors_are_those_of_one_process(tokenizer, small_chunks, rule):
    rows = source(conversations(60))
    rules = Rules() if rule == "skip_bad" else Rules(
        skip_bad=True, long_prompts="stop", max_prompt_tokens=99)  # fmt: skip
    errors = []
    for encode in (encode_in_memory, lambda *given: encode_source(given[0], "a", *given[1:])):
        with pytest.raises(DataError) as caught:
            encode(rows, tokenizer, rules)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert ("7 of 60 rows are malformed" in errors[0]) == (rule == "skip_bad")
    assert not [path for path in cache_folder().iterdir() if path.suffix != ".lock"]


def refuse(*_):
    pytest.fail("the rows are in the cache")


def test_a_second_start_reads_the_cache(tokenizer, monkeypatch, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(9))

    def load():
        path = str(tmp_path / "rows.jsonl")
        return PromptDataset.encode(read(path), tokenizer, content=content_of(path))

    first = load()
    monkeypatch.setattr(encoding, "Encoder", refuse)
    tokenizer("something", truncation=True, max_length=3)  # what was encoded last has no effect
    again = load()
    assert again.rows == first.rows
    assert again.counts == first.counts


def key(tokenizer, rules=None, content="a") -> str:
    rules = rules or Rules()
    return encoding._key(content, tokenizer, rules)


def test_the_key_is_of_all_that_the_rows_depend_on(tokenizer):
    other = toy.tokenizer()
    assert key(other) == key(tokenizer)
    renamed = toy.tokenizer()
    renamed.bos_token = "<|im_end|>"  # a template may write it
    other.add_tokens(["<extra>"])
    dated = toy.tokenizer()
    dated.chat_template += "{# #}"
    rules = [
        Rules(form="alpaca"), Rules(every_turn=True), Rules(template_options={"a": 1}),
        Rules(max_prompt_tokens=9), Rules(columns=("a",)), Rules(context="{prompt}"),
        Rules(others=(other,)), Rules(others=(dated,)),
    ]  # fmt: skip
    keys = [key(one) for one in (tokenizer, other, dated, renamed)]
    keys += [key(tokenizer, one) for one in rules]
    keys.append(key(tokenizer, content="b"))
    assert len(set(keys)) == len(keys)


def test_rows_with_a_date_are_encoded_again_on_another_day(monkeypatch):
    dated = toy.tokenizer()
    plain = key(dated)
    dated.chat_template += "{% set day = strftime_now('%d') %}"
    today = key(dated)

    class Tomorrow:
        @staticmethod
        def today():
            return "tomorrow"

    monkeypatch.setattr(encoding.datetime, "date", Tomorrow)
    assert key(dated) != today
    assert key(toy.tokenizer()) == plain


def test_the_content_of_a_source_is_its_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    stamp = path.stat().st_mtime_ns
    first = content_of(str(path))
    path.write_text('{"prompt": "b"}\n')
    os.utime(path, ns=(stamp, stamp))  # written so fast that size and time are the same
    assert content_of(str(path)) != first
    path.write_text('{"prompt": "a"}\n')
    assert content_of(str(path)) == first
    assert content_of(str(path), columns={"prompt": "a"}) != first
    assert content_of(str(path), add={"b": "c"}) != first
    assert content_of(str(tmp_path / "none.jsonl")) is None
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a"}\n')
    folder = content_of(str(tmp_path / "folder"))
    (tmp_path / "folder" / "test.jsonl").write_text('{"prompt": "a"}\n')
    assert len({first, folder, content_of(str(tmp_path / "folder"))}) == 3
    assert content_of("seed_tasks") == content_of("seed_tasks") is not None


def test_rows_of_the_datasets_library_are_cached(tokenizer, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list(toy.rows(5))
    assert dataset_content(rows)
    assert dataset_content(toy.rows(5)) is None
    first = PromptDataset.of(rows, tokenizer)
    monkeypatch.setattr(encoding, "Encoder", refuse)
    assert PromptDataset.of(rows, tokenizer).rows == first.rows


ENCODES = """
import os, signal, sys, time
from llmdistill.data import encoding
from llmdistill.data.validate import Rules
from tests import toy
old = encoding._encode_chunk
def slow(*given):
    print("encoding", flush=True)
    time.sleep(float(sys.argv[1]))
    return old(*given)
encoding._encode_chunk = slow
rows = [(f"x:{i}", row) for i, row in enumerate(toy.rows(9))]
found = encoding.encode_source(rows, "rows", toy.tokenizer(), Rules())
print(len(found.table), flush=True)
"""


def start(seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", ENCODES, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_one_process_encodes_while_the_others_wait():
    processes = [start(1.0) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(map(tuple, outputs)) == [("9",), ("9",), ("encoding", "9")]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_half_done():
    killed = start(60.0)
    assert killed.stdout.readline() == "encoding\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    before = time.monotonic()
    assert start(0.0).communicate(timeout=120)[0].split() == ["encoding", "9"]
    assert time.monotonic() - before < 60  # the lock of the killed one is free


# ---- tables ----

ROWS = [
    Row(7, [1, 2], [3], {"a": [1, None, "\ud800"]}, [4], ({"role": "user", "content": "x"},)),
    Row(8, [5], None),
    Row(2**41, [6, 7, 8], [], is_text=True),
]


def test_rows_come_back_as_they_were():
    rows = Rows.of(ROWS)
    assert list(rows) == ROWS
    assert [rows[i] for i in range(3)] == ROWS
    assert rows[-1] == ROWS[-1]
    assert rows[1:] == ROWS[1:]
    assert rows.lengths("prompt_ids").tolist() == [2, 1, 3]
    assert rows.lengths("response_ids").tolist() == [1, 0, 0]


def test_rows_are_joined_and_taken():
    one, two = Rows.of(ROWS), Rows.of(ROWS[::-1])
    both = Rows.join([one, two.take([2, 0])])
    assert list(both) == [*ROWS, ROWS[0], ROWS[2]]
    assert both.lengths("prompt_ids").tolist() == [2, 1, 3, 2, 3]
    assert both.digest() != one.digest()
    assert Rows.join([one.take([0]), one.take([1, 2])]).digest() == one.digest()


@pytest.mark.parametrize("changed", [
    Row(9, [5], None), Row(8, [4], None), Row(8, [5], []), Row(8, [5], None, {"b": 1}),
    Row(8, [5], None, {}, []),
])  # fmt: skip
def test_a_digest_is_of_every_part_of_a_row(changed):
    assert Rows.of([ROWS[0], changed]).digest() != Rows.of(ROWS[:2]).digest()


@pytest.mark.parametrize("content", [None, "rows"])
def test_a_column_that_is_no_text_is_a_malformed_row(tokenizer, content):
    rows = source([{"prompt": "a", "image": object()}, {"prompt": "b", "image": "b.png"}])
    with pytest.raises(DataError, match=r"1 of 2 rows[\s\S]*x:0: a column that the teacher reads"):
        encode_source(rows, content, tokenizer, Rules(columns=("image",)))
    skipping = Rules(columns=("image",), skip_bad=True)
    assert encode_source(rows, content, tokenizer, skipping).counts.bad == 1


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damaged_rows_are_encoded_again(tokenizer, caplog, damage):
    rows = source(toy.rows(5))
    first = list(Rows(encode_source(rows, "rows", tokenizer, Rules()).table))
    (path,) = cache_folder().glob("*/rows.arrow")
    data = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(data[:99])
    again = encode_source(rows, "rows", tokenizer, Rules())
    assert list(Rows(again.table)) == first
    assert "is damaged, so its rows are encoded again" in caplog.text


def test_without_a_cache_rows_are_encoded_in_memory(tokenizer, caplog, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    found = encode_source(source(toy.rows(5)), "rows", tokenizer, Rules())
    assert found.counts.kept == 5
    assert "encoded rows are not kept" in caplog.text


def test_blocks_are_taken_without_copies_of_the_table(monkeypatch):
    """Also out of order, over many batches; `Table.take` would copy whole columns each time."""
    monkeypatch.setattr(table, "BLOCK", 4)
    many = [Row(i, [i] * (1 + i % 3), [i] if i % 2 else None) for i in range(50)]
    rows = Rows.of(many)
    assert len(rows.table.to_batches()) > 5
    order = np.random.default_rng(0).permutation(50)
    assert list(rows.take(order)) == [many[i] for i in order]
    assert list(rows.take(np.repeat(np.arange(50), 2))) == [one for one in many for _ in range(2)]
    assert rows.take(np.arange(7, 31)).digest() == Rows.of(many[7:31]).digest()


def test_a_row_takes_little_memory(tokenizer, tmp_path):
    """Less than five bytes a token and 100 bytes a row on disk."""
    row = {"prompt": "word " * 100, "completion": "word " * 400}
    encode_source([("x", row)] * 500, "long", tokenizer, Rules())
    (path,) = cache_folder().glob("*/rows.arrow")
    tokens = sum(len(one.prompt_ids) + len(one.response_ids) for one in Rows(
        encode_source([], "long", tokenizer, Rules()).table))  # fmt: skip
    assert path.stat().st_size < 4 * tokens + 100 * 500 + 10_000
    assert json.loads(path.with_name("counts.json").read_text())["kept"] == 500
