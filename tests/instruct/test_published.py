"""A dataset that others may see: no names of this machine, right licences, clean splits."""

from __future__ import annotations

import json
import unicodedata
from types import SimpleNamespace

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from llmdistill.evaluation.words import plain_words
from llmdistill.generate import generate
from llmdistill.instruct import filters
from llmdistill.instruct.dataset import write_splits
from llmdistill.instruct.records import replace_lines
from llmdistill.instruct.tasks import Task
from llmdistill.publish import data_card
from llmdistill.publish.hub import push
from llmdistill.publish.licences import Licence
from tests.support.files import read_jsonl, write_jsonl
from tests.support.recipes import build_generation
from tests.support.servers import chat, scripted

slow = pytest.mark.slow


def numbered(body, number):
    return chat(f"Describe thing {number} that {number * 7} people in town {number * 3} keep.")


def recipe(server, folder, teacher=None, **changes):
    given = {
        "output": str(folder / "set"), "filters": [], "test_share": 0.3,
        "teacher": {"kind": "remote", "model": "m", "url": server.url, **(teacher or {})},
    }  # fmt: skip
    return build_generation(given | changes)


def prompts(folder, number=8):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.jsonl"
    write_jsonl(path, [{"prompt": f"What is {i} plus {i}?"} for i in range(number)])
    return str(path)


@slow
def test_neither_card_nor_rows_name_a_folder_an_address_or_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET_NAME", "secret")
    home = tmp_path / "home" / "alice" / "private"
    file = prompts(home)
    with scripted(numbered) as server:
        teacher = {"model": "/srv/models/bob/llm-7b", "key_from": "MY_SECRET_NAME"}
        held = home / "held.jsonl"
        write_jsonl(held, [{"prompt": "Who wrote the book of the sea and the birds of it?"}])
        contamination = [{"kind": "contamination", "sources": str(held)}]
        changes = {"generator": {"kind": "answer", "prompts": file}, "filters": contamination}
        made = generate(recipe(server, home, teacher, **changes))
        port = str(server.server_port)
    names = ("README.md", "train.jsonl", "test.jsonl")
    texts = {name: (made.folder / name).read_text() for name in names}
    for name, text in texts.items():
        for private in ("alice", "/srv", "bob", "MY_SECRET_NAME", str(tmp_path), port, "127.0"):
            assert private not in text, name
    assert "source: prompts.jsonl" in texts["README.md"]
    assert "source: held.jsonl" in texts["README.md"]
    assert "**Teacher**: `llm-7b`" in texts["README.md"]
    assert json.loads(texts["train.jsonl"].split("\n")[0])["teacher"] == "llm-7b"


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("openai/gpt-x", "openai/gpt-x"),
        ("accounts/fireworks/models/x", "accounts/fireworks/models/x"),
        ("/data/models/x", "x"), ("~/x/y", "y"), ("./x", "x"), ("C:\\models\\x", "x"),
    ],
)  # fmt: skip
def test_the_name_of_a_model_on_a_server(model, shown):
    assert data_card.public_model(model) == shown


LICENSED = "---\nlicense: {}\n---\n"


def a_folder(path, license, rows=6):
    path.mkdir()
    (path / "README.md").write_text(LICENSED.format(license))
    given = [
        {"instruction": f"Explain the rule number {i} of the house to a child.", "output": "So."}
        for i in range(rows)
    ]
    write_jsonl(path / "data.jsonl", given)
    return str(path)


@slow
@pytest.mark.parametrize(
    ("seeds", "teacher", "license"),
    [
        ("cc-by-nc-4.0", "apache-2.0", "other"), ("mit", "mit", "mit"), ("mit", None, "other"),
        ("[mit, apache-2.0]", "mit", "other"), ("other", "mit", "other"),
    ],
)  # fmt: skip
def test_one_licence_only_if_seeds_and_teacher_agree(tmp_path, seeds, teacher, license):
    source = a_folder(tmp_path / "ds", seeds)
    with scripted(numbered) as server:
        changes = {"generator": {"kind": "evolve"}, "seed_tasks": source, "target": 3}
        made = generate(recipe(server, tmp_path, {"license": teacher}, **changes))
    card = DatasetCard.load(made.folder / "README.md")
    assert card.data.license == license
    stated = seeds.strip("[]").replace(", ", "-and-")
    assert f"**Made from**: `ds` ({stated})" in card.text


@slow
def test_a_file_of_unknown_licence_makes_the_licence_unknown(tmp_path):
    with scripted(numbered) as server:
        generator = {"kind": "answer", "prompts": prompts(tmp_path)}
        made = generate(recipe(server, tmp_path, {"license": "mit"}, generator=generator))
    card = DatasetCard.load(made.folder / "README.md")
    assert (card.data.license, card.data.to_dict()["license_name"]) == ("other", "see-below")
    assert "`prompts.jsonl` (licence not known)" in card.text


def test_the_owner_of_a_dataset_is_credited(tmp_path, monkeypatch):
    monkeypatch.setattr(
        data_card, "licence_of_data", lambda source: Licence(f"{source.partition(':')[0]}-terms")
    )
    monkeypatch.setattr(data_card, "read_licence", lambda name: None)
    generator = {"kind": "answer", "prompts": "openai/gsm8k:main:train"}
    made = recipe(SimpleNamespace(url="http://x/v1"), tmp_path, generator=generator)
    card = data_card.data_card(made, data_card.Outcome({"train": 1}, {}, {}, ""))
    assert "`openai/gsm8k:main:train` (openai/gsm8k-terms)" in card


# ---- splits ----


def rows(texts):
    return [
        {"id": f"{i}-0", "instruction": text, "input": "", "output": f"So {i}."}
        for i, text in enumerate(texts)
    ]


def test_no_question_is_in_both_splits_in_another_spelling(tmp_path):
    spellings = [
        "Who wrote text {}?", "who wrote text {}?", "Who  wrote text {}?", " Who wrote\ntext {}? ",
        "WHO WROTE TEXT {}", "Who wrote 'text {}'?", "\uff37ho wrote text {}?",
    ]  # fmt: skip
    texts = [one.format(i) for i in range(60) for one in spellings]
    replace_lines(tmp_path / "rows.jsonl", rows(texts))
    sizes = write_splits(tmp_path, format="alpaca", test_share=0.3)
    assert min(sizes.values()) > 50

    def questions(split):
        return {
            text.strip().split()[-1].strip("'?")
            for text in (row["instruction"] for row in read_jsonl(tmp_path / f"{split}.jsonl"))
        }

    assert not questions("train") & questions("test")


def test_an_input_makes_another_question_and_its_place_does_not(tmp_path):
    given = rows(["Add. 2 and 3"] * 40 + ["Add."] * 40)
    given[40:] = [row | {"input": "2 and 3"} for row in given[40:]]
    replace_lines(tmp_path / "rows.jsonl", [*given, *rows(["Other one", "Another one", "A third"])])
    write_splits(tmp_path, format="alpaca", test_share=0.5)
    found = {
        split: {row["output"] for row in read_jsonl(tmp_path / f"{split}.jsonl")}
        for split in ("train", "test")
    }
    same = {row["output"] for row in given}
    assert same <= found["train"] or same <= found["test"]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("number", [2, 3, 9])
def test_a_small_dataset_has_both_splits(tmp_path, number, share):
    replace_lines(tmp_path / "rows.jsonl", rows([f"Say {i}." for i in range(number)]))
    sizes = write_splits(tmp_path, format="messages", test_share=share)
    assert set(sizes) == {"train", "test"}
    assert sum(sizes.values()) == number


def test_a_single_question_is_to_train_on(tmp_path):
    for text in "abcdefgh":
        replace_lines(tmp_path / "rows.jsonl", rows([text]))
        assert write_splits(tmp_path, format="messages", test_share=0.9) == {"train": 1}


# ---- duplicates ----


@slow
@pytest.mark.parametrize("keeps", [False, True])
def test_equal_rows_are_counted(tmp_path, keeps):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"prompt": text} for text in ("a?", "a?", "b?", "a?")])
    with scripted(lambda body, number: chat("So be it.")) as server:
        changes = {"filters": []} if keeps else {"filters": None}
        generator = {"kind": "answer", "prompts": str(path)}
        made = generate(recipe(server, tmp_path, generator=generator, **changes))
    card = (made.folder / "README.md").read_text()
    if keeps:
        assert (made.counts.kept, made.counts.copies) == (4, 2)
        assert "2 rows equal another row" in card
    else:
        assert (made.counts.kept, made.counts.dropped) == (2, {"duplicate": 2})
        assert "equal another" not in card


def test_composed_and_decomposed_letters_are_the_same():
    composed = "Die schöne Müllerin fährt früh über die grüne Brücke nach Köln zurück."
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    assert plain_words(composed) == plain_words(decomposed)
    found = filters.Contamination([composed], 10).reason(Task("Copy it.", "", decomposed))
    assert found == "in an evaluation set"


def test_near_duplicates_hold_little_memory():
    near = filters.NearDuplicates()
    for number in range(300):
        near.kept(Task(f"What is {number} and {number * 7} and so on?", "", f"It is {number}."))
    assert near.sketches.nbytes <= 512 * 128 * 4
    assert near.reason(Task("What is 7 and 49 and so on?", "", "It is 7.")) == "near duplicate"
    assert near.reason(Task("Who are you, and where do you live now?", "", "Here.")) is None


# ---- the Hub ----


@slow
def test_only_the_files_of_the_dataset_are_pushed(tmp_path, hub):
    with scripted(numbered) as server:
        generator = {"kind": "answer", "prompts": prompts(tmp_path)}
        made = generate(recipe(server, tmp_path, generator=generator))
    (made.folder / "notes.txt").write_text("mine")
    push(made.folder, "me/set")
    assert set(hub.repos["datasets", "me/set"].branches["main"]) == {
        "README.md", "train.jsonl", "train.parquet", "test.jsonl", "test.parquet",
    }  # fmt: skip
    assert load_dataset(str(made.folder), cache_dir=str(tmp_path / "cache"))["train"].num_rows > 0


def test_images_in_their_folder_are_named_from_there(tmp_path):
    from llmdistill.instruct.build import _with_relative_images

    task = Task("Look.", images=(str(tmp_path / "a" / "1.png"), "2.png", "/else/3.png"))
    assert _with_relative_images(task, tmp_path).images == ("a/1.png", "2.png", "/else/3.png")
