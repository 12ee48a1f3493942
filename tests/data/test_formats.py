"""Rows in every form become one; what is malformed is named by place and field (S7)."""

from __future__ import annotations

import json

import pytest

from llmdistill.data.formats import SEED_TASKS, Example, read, to_example
from llmdistill.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
PLACE = "train.jsonl:214"


def refused(row, form="auto") -> str:
    with pytest.raises(DataError) as caught:
        to_example(row, PLACE, form=form)
    said = str(caught.value)
    assert said.startswith(f"{PLACE}: ")
    return said


def write(tmp_path, content: str | bytes) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# ---- the forms ----


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"messages": [USER, ANSWER]}, [USER], "yo"),
        ({"messages": [USER]}, [USER], None),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], None),
        (
            {"messages": [{"role": "system", "content": ""}, USER, ANSWER, USER, ANSWER]},
            [{"role": "system", "content": ""}, USER, ANSWER, USER],
            "yo",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "3"}]},
            [USER, {"role": "tool", "content": "3"}],
            None,
        ),
        ({"messages": [USER | {"name": "x"}, ANSWER]}, [USER], "yo"),
        ({"prompt": "hi", "completion": "yo"}, [USER], "yo"),
        ({"prompt": "hi"}, [USER], None),
        ({"prompt": "hi", "completion": None}, [USER], None),
        ({"prompt": "hi", "completion": " \n"}, [USER], None),
        ({"instruction": "hi", "input": "", "output": "yo"}, [USER], "yo"),
        ({"instruction": "hi", "output": " yo "}, [USER], " yo "),
        ({"instruction": "a", "input": "b"}, [{"role": "user", "content": "a\n\nb"}], None),
        ({"instruction": "hi", "other": 3}, [USER], None),
    ],
)
def test_every_form_becomes_a_conversation_and_its_answer(row, prompt, response):
    assert to_example(row, PLACE) == Example(tuple(prompt), response, PLACE)


@pytest.mark.parametrize(
    ("form", "content"),
    [("messages", "m"), ("prompt_completion", "p"), ("alpaca", "i"), ("auto", "m")],
)
def test_a_row_that_fits_many_forms_is_read_in_the_one_asked_for(form, content):
    row = {
        "instruction": "i",
        "prompt": "p",
        "messages": [{"role": "user", "content": "m"}],
    }
    assert to_example(row, PLACE, form=form).prompt[0]["content"] == content


# ---- what is malformed ----


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "must be an object with fields, got list"),
        ("hi", "got str"),
        (None, "got NoneType"),
        ({"text": "hi", "b": 1}, "none of the fields 'messages', 'prompt', 'instruction'"),
        ({}, "it has []"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": "hi"}, "'messages' must be a list of messages, got 'hi'"),
        ({"messages": None}, "got None"),
        ({"messages": ["hi"]}, "'messages[0]' must be an object"),
        (
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            "'messages[1]'.role must be one of",
        ),
        ({"messages": [{"content": "x"}]}, "'messages[0]'.role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "'messages[0]'.role"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            "'messages[1]'.content must be text, got None",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0]'.content"),
        ({"messages": [USER, ANSWER | {"content": " "}]}, "'messages[1].content' is empty"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "ends with role 'system'"),
        ({"messages": [ANSWER]}, "no message with role 'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no message with role 'user'"),
        ({"prompt": ""}, "'prompt' must be text that is not empty"),
        ({"prompt": 3}, "'prompt' must be text that is not empty, got 3"),
        ({"prompt": [USER]}, "'prompt' must be text"),
        ({"prompt": "hi", "completion": 3}, "'completion' must be text, got 3"),
        ({"instruction": " "}, "'instruction' must be text that is not empty"),
        ({"instruction": None}, "'instruction'"),
        ({"instruction": "hi", "input": {}}, "'input' must be text, got {}"),
        ({"instruction": "hi", "output": ["yo"]}, "'output' must be text"),
        ({"text": "hi", 3: 1}, "none of the fields"),
    ],
)
def test_a_malformed_row_is_named_with_its_field(row, said):
    assert said in refused(row)


@pytest.mark.parametrize(
    ("form", "field"),
    [("messages", "messages"), ("prompt_completion", "prompt"), ("alpaca", "instruction")],
)
def test_a_row_of_another_form_than_asked_for_is_named(form, field):
    assert f"'{field}'" in refused({"text": "hi"}, form)


def test_a_long_value_is_shown_short():
    assert len(refused({"messages": "x" * 9999})) < 150


# ---- files ----


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    source = write(tmp_path, '{"a": 1}\n\n  \n{"a": 2}\n')
    assert list(read(source)) == [(f"{source}:1", {"a": 1}), (f"{source}:4", {"a": 2})]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [True, False])
def test_files_of_any_editor_are_read(tmp_path, mark, end, last):
    source = write(
        tmp_path, mark + end.join([b'{"a": 1}', b"", b'{"a": 2}']) + (end if last else b"")
    )
    assert list(read(source)) == [(f"{source}:1", {"a": 1}), (f"{source}:3", {"a": 2})]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_separators_in_a_string_end_no_line(tmp_path, mark):
    row = {"prompt": f"a{mark}b"}
    source = write(tmp_path, json.dumps(row, ensure_ascii=False) + '\n{"c": 1}\n')
    assert list(read(source)) == [(f"{source}:1", row), (f"{source}:2", {"c": 1})]


@pytest.mark.parametrize(
    "line",
    ['{"a": 1', '{"a": 1}{"b": 2}', "hi", "{'a': 1}", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"],
    ids=["cut", "two in one", "no JSON", "Python", "deep", "long number"],
)
def test_a_line_that_is_no_json_is_a_bad_row_and_not_the_end(tmp_path, line):
    source = write(tmp_path, f'{{"a": 1}}\n{line}\n{{"a": 3}}\n')
    first, bad, last = read(source)
    assert (first[1], last) == ({"a": 1}, (f"{source}:3", {"a": 3}))
    assert bad[0] == f"{source}:2"
    assert isinstance(bad[1], DataError)
    assert str(bad[1]).startswith(f"{source}:2: not a line of JSON")


def test_a_file_in_another_encoding_is_named(tmp_path):
    source = write(tmp_path, '{"prompt": "na\u00efve"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        list(read(source))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no such file: .*none\.jsonl"):
        list(read(str(tmp_path / "none.jsonl")))


def test_the_packages_own_rows():
    rows = list(read(SEED_TASKS))
    assert len(rows) == 175
    assert rows[0][0] == "seed_tasks:1"
    examples = [to_example(row, place, form="alpaca") for place, row in rows]
    assert all(example.response for example in examples)
    assert len({example.prompt[0]["content"] for example in examples}) == 175


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [("org/rows", "org/rows", "train"), ("org/rows:test", "org/rows", "test")],
)
def test_a_data_set_of_the_hub(monkeypatch, source, name, split):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"a": 1}, {"a": 2}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(read(source)) == [(f"{source}[0]", {"a": 1}), (f"{source}[1]", {"a": 2})]
    assert asked == [(name, split)]


def test_a_data_set_that_does_not_come_says_what_to_do(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'org/rows': ConnectionError: offline.*\.jsonl file"):
        list(read("org/rows"))
