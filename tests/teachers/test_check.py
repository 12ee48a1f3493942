"""`llmdistill check` of every kind of teacher: what is loaded where, what is trained, and the memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from llmdistill.cli import main
from llmdistill.publish.card import model_card
from llmdistill.recipe import build
from tests import toy
from tests.conformance import entries
from tests.support import vision
from tests.support.teachers import section_on_toys


@pytest.fixture
def given(pair, tmp_path):
    """A recipe on toys without its teacher, whose rows have every column that a teacher reads."""
    image, *_ = vision.pictures(tmp_path)
    rows = [row | {"input": "ab"[i % 2], "images": image} for i, row in enumerate(toy.rows(6))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output": str(tmp_path / "run"),
        "student": {"model": pair[1]},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "objectives": [{"kind": "response"}, {"kind": "cross_entropy"}],
        "training": {"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 2},
    }


def check(given, tmp_path, monkeypatch, capsys, *options):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(given))
    monkeypatch.setattr(sys, "argv", ["llmdistill", "check", str(path), *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", entries.teachers())
def test_it_is_checked_and_timed(name, given, pair, tmp_path, monkeypatch, capsys):
    given["teacher"] = section_on_toys(entries.teachers()[name], pair)
    if name == "adapter_off":
        given["student"]["peft"] = {"r": 4}
    shown = check(given, tmp_path, monkeypatch, capsys, "--time")
    section = build(given).teacher
    assert "trained      " in shown
    for text in (section.who, section.trains):
        assert text is None or text in shown
    for one in section.models:
        assert f"{one.model} on cpu (float32)" in shown
    assert "s per step on this machine" in shown
    card = model_card(build(given), None)
    assert section.who in card
    assert all(Path(model).name in card for model, _ in build(given).teacher_sources)


def test_the_memory_of_what_trains_along_is_shown_by_part(
    given, pair, tmp_path, monkeypatch, capsys
):
    online = {"kind": "online", "model": pair[0]}
    mutual = {"kind": "mutual", "peers": [{"model": pair[1], "carve": {"layers": 2}}]}
    average = {"kind": "reflexive", "weights": "ema"}
    for teacher, parts in (
        (online, ["teacher's weights", "teacher's adapter: optimizer", "adapter: activations"]),
        (mutual, ["peer 1: weights", "peer 1: gradients", "peer 1: optimizer"]),
        (average, ["teacher's copies of weights"]),
    ):
        from llmdistill.cost import memory
        from llmdistill.data.collate import PromptDataset

        rows = PromptDataset.of(toy.rows(4), toy.tokenizer())
        found = memory(build(given | {"teacher": teacher}), rows)
        for part in parts:
            assert any(part in name for name in found), (part, list(found))
    trained = toy.model().num_parameters()
    assert found["teacher's copies of weights"] == 2 * 4 * trained


def test_the_runs_of_a_chain_are_listed_and_the_first_is_checked(
    given, pair, tmp_path, monkeypatch, capsys
):
    assistant = str(tmp_path / "run.assistant1" / "student")
    given["teacher"] = {
        "kind": "chain", "teacher": {"model": pair[0]}, "assistants": [{"model": pair[1]}],
    }  # fmt: skip
    given["student"] = {"model": assistant, "carve": {"layers": 2}}  # it does not exist yet
    shown = check(given, tmp_path, monkeypatch, capsys)
    assert f"run 1 of 2   {pair[0]} teaches {pair[1]} in {tmp_path}/run.assistant1" in shown
    assert f"run 2 of 2   {assistant} teaches {assistant} in {tmp_path}/run" in shown
