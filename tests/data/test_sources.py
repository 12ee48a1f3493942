"""Rows out of files of every kind and from any editor; what cannot be read is named (S7)."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import datasets
import pytest

from llmdistill.data.formats import to_examples
from llmdistill.data.sources import SEED_TASKS, hub_name, read
from llmdistill.errors import DataError
from tests.support.files import write_jsonl


def write(tmp_path, content: str | bytes) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


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
    assert str(bad[1]).startswith(f"{source}:2: not valid JSON")


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
    examples = [to_examples(row, place, form="alpaca")[0] for place, row in rows]
    assert all(example.response for example in examples)
    assert len({example.prompt[0]["content"] for example in examples}) == 175


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [
        ("org/rows", None, "train"),
        ("org/rows:test", None, "test"),
        ("org/rows:test[:100]", None, "test[:100]"),
        ("org/rows:main:test", "main", "test"),
        ("org/rows:main:test[10:100]", "main", "test[10:100]"),
    ],
)
def test_a_data_set_of_the_hub(monkeypatch, source, config, split):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return [{"a": 1}, {"a": 2}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(read(source)) == [(f"{source}[0]", {"a": 1}), (f"{source}[1]", {"a": 2})]
    assert asked == [("org/rows", config, split, False)]


def test_a_data_set_that_does_not_come_says_what_to_do(monkeypatch):
    def load_dataset(name, config, split, streaming):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'org/rows': ConnectionError: offline.*\.parquet"):
        list(read("org/rows"))


def test_a_stream_of_the_hub_is_asked_for_as_one(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda name, config, split, streaming: asked.append(streaming) or [],
    )
    assert list(read("org/rows", streaming=True)) == []
    assert asked == [True]


@pytest.mark.parametrize("source", ["seed_tasks", "a.jsonl", "b/c.csv", "./b", "/abs/rows"])
def test_what_is_on_this_machine_is_no_data_set_of_the_hub(source):
    assert hub_name(source) is None


def test_a_folder_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("data/rows") == "data/rows"
    (tmp_path / "data" / "rows").mkdir(parents=True)
    assert hub_name("data/rows") is None


# ---- other kinds of files ----

ROWS = [{"prompt": "na\u00efve \U0001f426", "completion": None}, {"prompt": "b", "completion": "c"}]
CSV = 'prompt,completion\n"na\u00efve \U0001f426",\n"b",c\n'


def parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "rows.csv": lambda path: path.write_text(CSV, encoding="utf-8-sig", newline=""),
    "crlf.csv": lambda path: path.write_text(CSV.replace("\n", "\r\n"), "utf-8", newline=""),
    "rows.tsv": lambda path: path.write_text(CSV.replace(",", "\t"), "utf-8", newline=""),
    "rows.parquet": parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_from_every_kind_of_file(tmp_path, name):
    WRITERS[name](tmp_path / name)
    read_rows = list(read(str(tmp_path / name)))
    assert [row for _, row in read_rows] == ROWS
    assert all(place.startswith(str(tmp_path / name)) for place, _ in read_rows)
    assert len({place for place, _ in read_rows}) == 2


def test_a_folder_is_all_its_files_by_name(tmp_path):
    WRITERS["rows.csv"](tmp_path / "b.csv")
    WRITERS["rows.parquet"](tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("# Rows")
    places = [place for place, _ in read(str(tmp_path))]
    expected = ["a.parquet[0]", "a.parquet[1]", "b.csv:2", "b.csv:3"]
    assert places == [f"{tmp_path}/{name}" for name in expected]


def test_a_folder_that_datasets_saved(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in read(str(tmp_path / "saved"))] == ROWS


def test_a_folder_without_rows_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"has no file of type \.jsonl, \.json, \.csv"):
        list(read(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", b"prompt\n\xff\xfe", "is not valid UTF-8"),
        ("rows.csv", b'prompt,completion\n"a', "not a valid table"),
        ("rows.json", b'[{"prompt": "a"},', "not valid JSON"),
        ("rows.parquet", b"PAR1 no", "not a valid Parquet file"),
        ("rows.parquet", b"", "not a valid Parquet file"),
        ("rows.xlsx", b"PK", "this type of file is not supported. Give a file"),
    ],
)
def test_a_file_that_is_broken_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read(str(tmp_path / name)))
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert list(read(str(tmp_path / name))) == []


def test_a_line_of_a_table_with_other_columns_is_a_bad_row_and_not_the_end(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nc\nd,e,f\ng,h\n")
    first, short, long, last = read(str(tmp_path / "rows.csv"))
    assert (first[1]["prompt"], last[1]["prompt"]) == ("a", "g")
    for number, (place, row) in ((3, short), (4, long)):
        assert isinstance(row, DataError)
        assert str(row) == f"{place}: the row does not have the 2 columns of the header"
        assert place.endswith(f"rows.csv:{number}")


def test_a_line_of_twenty_megabytes(tmp_path):
    rows = [{"prompt": "x" * 20_000_000}, {"prompt": "y"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.csv").write_text("prompt\n" + "\n".join(row["prompt"] for row in rows))
    for name in ("rows.jsonl", "rows.csv"):
        assert [len(row["prompt"]) for _, row in read(str(tmp_path / name))] == [20_000_000, 1]


def test_a_parquet_of_other_types_is_refused_by_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"prompt": 3, "messages": None}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((place, row),) = read(str(tmp_path / "rows.parquet"))
    with pytest.raises(
        DataError, match=r"rows\.parquet\[0\]: 'prompt' must be non-empty text, got 3"
    ):
        to_examples(row, place, form="prompt_completion")


def test_nested_lists_of_a_parquet_are_messages(tmp_path):
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    table = pyarrow.Table.from_pylist([{"messages": messages, "id": 1}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((place, row),) = read(str(tmp_path / "rows.parquet"))
    assert to_examples(row, place)[0].response == "yo"


# ---- other names ----


def test_columns_are_read_by_other_names(tmp_path):
    source = write(tmp_path, '{"q": "hi", "a": "yo", "instruction": "old", "id": 1}\n')
    ((place, row),) = read(source, columns={"instruction": "q", "output": "a"})
    assert row == {"instruction": "hi", "output": "yo", "id": 1}
    assert to_examples(row, place)[0].response == "yo"


def test_two_columns_may_swap_their_names(tmp_path):
    source = write(tmp_path, '{"prompt": "a", "completion": "b"}\n')
    columns = {"prompt": "completion", "completion": "prompt"}
    assert [row for _, row in read(source, columns=columns)] == [{"prompt": "b", "completion": "a"}]


def test_a_column_that_is_not_there_is_a_bad_row(tmp_path):
    source = write(tmp_path, '{"q": "hi"}\n3\n{"question": "hi"}\n')
    _, number, bad = read(source, columns={"prompt": "q"})
    assert number == (f"{source}:2", 3)
    assert (
        str(bad[1])
        == f"{source}:3: 'columns' of the source names the field 'q', but the row has question"
    )


def test_a_source_can_add_fields_to_its_rows(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b", "domain": "x"}])
    rows = [row for _, row in read(str(path), add={"domain": "maths"})]
    assert rows[0] == {"prompt": "a", "domain": "maths"}
    assert isinstance(rows[1], DataError)
    assert "'add' of the source sets the field 'domain', but the row already has it" in str(rows[1])


# ---- folders and files that people have ----

ONE, TWO = {"prompt": "one"}, {"prompt": "two"}


def prompts(source) -> list[str]:
    return [row["prompt"] for _, row in read(str(source))]


def test_a_saved_dataset_dict_has_splits(tmp_path):
    both = {"train": datasets.Dataset.from_list([ONE]), "test": datasets.Dataset.from_list([TWO])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "dd")
    assert prompts(tmp_path / "dd") == ["one"]
    assert prompts(f"{tmp_path}/dd:test") == ["two"]
    assert prompts(tmp_path / "dd/test") == ["two"]
    with pytest.raises(DataError, match=r"no split 'dev'; the folder has test, train.*dd:test"):
        prompts(f"{tmp_path}/dd:dev")
    datasets.DatasetDict({"dev": both["test"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match=r"no split 'train'; the folder has dev"):
        prompts(tmp_path / "other")


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_compressed_file_is_read(tmp_path, opener, kind):
    suffix = {gzip.open: ".gz", bz2.open: ".bz2", lzma.open: ".xz"}[opener]
    text = "prompt\none\n" if kind in (".csv", ".tsv") else '{"prompt": "one"}\n'
    with opener(tmp_path / f"rows{kind}{suffix}", "wb") as file:
        file.write(text.encode())
    assert prompts(tmp_path / f"rows{kind}{suffix}") == ["one"]
    assert prompts(tmp_path) == ["one"]
    assert hub_name(f"rows{kind}{suffix}") is None


def test_zst_is_read_or_names_its_package(tmp_path):
    try:
        import zstandard
    except ImportError:
        (tmp_path / "rows.jsonl.zst").write_bytes(b"x")
        with pytest.raises(DataError, match="pip install zstandard"):
            prompts(tmp_path / "rows.jsonl.zst")
        return
    packed = b"".join(zstandard.compress(json.dumps(row).encode() + b"\n") for row in (ONE, TWO))
    (tmp_path / "rows.jsonl.zst").write_bytes(packed)
    assert prompts(tmp_path / "rows.jsonl.zst") == ["one", "two"]


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: the compressed file is damaged"):
        prompts(tmp_path / "rows.jsonl.gz")


def test_hidden_files_are_left_alone_and_others_are_named(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", [ONE])
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / ".DS_Store").write_bytes(b"\xff")
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "b.arrow").write_bytes(b"x")
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more/c.jsonl", [TWO])
    assert prompts(tmp_path) == ["one", "two"]
    assert "files that are not read: b.arrow" in caplog.text


def test_the_splits_of_a_folder_are_those_of_load_dataset(tmp_path, caplog):
    """Its test rows are not trained on."""
    write_jsonl(tmp_path / "train.jsonl", [ONE])
    write_jsonl(tmp_path / "test.jsonl", [TWO])
    assert prompts(tmp_path) == ["one"]
    assert prompts(f"{tmp_path}:test") == ["two"]
    assert hub_name(f"{tmp_path}:test") is None
    loaded = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    assert {name: split["prompt"] for name, split in loaded.items()} == {
        "train": ["one"],
        "test": ["two"],
    }
    write_jsonl(tmp_path / "other.jsonl", [TWO])
    assert prompts(tmp_path) == ["one"]
    assert "files that are not read: other.jsonl" in caplog.text


def test_shards_of_a_split_are_read_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    for number, row in enumerate((ONE, TWO)):
        write_jsonl(tmp_path / f"data/train-0000{number}-of-00002.jsonl", [row])
    write_jsonl(tmp_path / "data/test-00000-of-00001.jsonl", [ONE])
    assert prompts(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("indent", [2, None])
def test_rows_within_an_object_are_said_to_be_there(tmp_path, indent):
    whole = {"version": 1, "data": [ONE]}
    (tmp_path / "rows.json").write_text(json.dumps(whole, indent=indent))
    with pytest.raises(DataError, match=r"not at the top of this file.*version, data.*in 'data'"):
        prompts(tmp_path / "rows.json")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_that_stands_twice_is_an_error(tmp_path, name):
    text = '{"prompt": "one", "prompt": "two"}'
    (tmp_path / name).write_text(text)
    ((_, row),) = read(str(tmp_path / name))
    assert "the key 'prompt' occurs twice" in str(row)
    (tmp_path / "list.json").write_text(f"[{text}]")
    with pytest.raises(DataError, match="twice"):
        prompts(tmp_path / "list.json")


def test_a_column_that_stands_twice_is_an_error(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,output,output\na,b,c\n")
    with pytest.raises(DataError, match="the header names the column 'output' twice"):
        prompts(tmp_path / "rows.csv")


def test_a_quotation_mark_in_plain_tsv_is_text(tmp_path):
    (tmp_path / "rows.tsv").write_text('prompt\tcompletion\n"quoted" start\tb "c"\n')
    ((_, row),) = read(str(tmp_path / "rows.tsv"))
    assert row == {"prompt": '"quoted" start', "completion": 'b "c"'}


def test_a_folder_by_a_relative_path_or_an_odd_name(tmp_path, monkeypatch, caplog):
    for name in ("rel", "rows [2]", "a*b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        write_jsonl(tmp_path / name / "a.jsonl", [ONE])
        write_jsonl(tmp_path / name / "sub/b.jsonl", [TWO])
        assert prompts(tmp_path / name) == ["one", "two"]
    monkeypatch.chdir(tmp_path)
    assert prompts("rel") == prompts("./rel") == prompts("rel:train") == ["one", "two"]
    assert [place for place, _ in read("rel")] == ["rel/a.jsonl:1", "rel/sub/b.jsonl:1"]
    (tmp_path / "link").symlink_to(tmp_path / "rel")
    assert prompts("link") == ["one", "two"]
    assert not caplog.text


def test_files_that_belong_to_no_split_are_named(tmp_path):
    write_jsonl(tmp_path / "alpaca.jsonl", [ONE])
    write_jsonl(tmp_path / "my_test_questions.jsonl", [TWO])
    with pytest.raises(DataError, match=r"no split 'train'.*alpaca\.jsonl tells no split"):
        prompts(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_an_archive_that_breaks_off_is_named(tmp_path, suffix):
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    path = tmp_path / f"rows.jsonl{suffix}"
    with opener(path, "wb") as file:
        file.write(b'{"prompt": "one"}\n' * 5000)
    whole = bytearray(path.read_bytes())
    for damaged in (whole[: len(whole) // 2], whole[:20] + b"\x00" * 20 + whole[40:]):
        path.write_bytes(bytes(damaged))
        with pytest.raises(DataError, match="the compressed file is damaged"):
            prompts(path)


def test_a_compressed_table_is_not_read(tmp_path):
    (tmp_path / "x.parquet.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="this type of file is not supported"):
        prompts(tmp_path / "x.parquet.gz")


def test_nulls_that_a_table_fills_in_are_no_fields(tmp_path):
    """In JSON lines a null is what its writer meant."""
    calls = [
        {"function": {"name": "w", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "w", "arguments": {"date": "1 May"}}},
    ]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for source in (tmp_path / "saved", tmp_path / "rows.parquet"):
        found = [row["messages"][0]["tool_calls"] for _, row in read(str(source))]
        assert found == [[call] for call in calls]
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "more": {"b": None}}])
    assert next(read(str(tmp_path / "rows.jsonl")))[1]["more"] == {"b": None}


def test_links_are_followed_by_their_own_names(tmp_path):
    """The files of a downloaded dataset are links to files without a suffix."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snap").mkdir()
    write_jsonl(tmp_path / "blobs/abc", [ONE])
    (tmp_path / "snap/train.jsonl").symlink_to(tmp_path / "blobs/abc")
    assert prompts(tmp_path / "snap") == ["one"]


def test_one_row_over_several_lines_is_a_row(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ONE, indent=2))
    assert prompts(tmp_path / "rows.json") == ["one"]


def test_a_split_that_a_generated_dataset_lacks_is_named(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [ONE])
    (tmp_path / "calls.jsonl").write_text("{}")
    assert prompts(tmp_path) == ["one"]
    with pytest.raises(DataError, match="no split 'test'; the folder has train"):
        prompts(f"{tmp_path}:test")
