"""`llmdistill evaluate` with more than the figures: drafts, several teachers, forgetting, benchmarks."""

from __future__ import annotations

import functools
import json

import pytest

from llmdistill.evaluation.measure import Evaluation
from llmdistill.evaluation.speculative import Speculation
from tests import toy
from tests.support.commands import run
from tests.support.files import write_jsonl
from tests.support.tasks import save_task


@pytest.fixture
def measure(pair, monkeypatch, tmp_path):
    """A function that runs the command on three rows and returns its figures."""
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(3))
    monkeypatch.setattr(Evaluation, "_speed", lambda self, model: 1.0)  # most of the time

    def measured(*options: str, students=(pair[1],)) -> dict:
        given = ["--data", f"{tmp_path}/rows.jsonl", "--max-new-tokens", "4"]
        given += ["--output", f"{tmp_path}/out.json", *options]
        assert run(monkeypatch, "evaluate", *students, "--teacher", pair[0], *given) == 0
        return json.loads((tmp_path / "out.json").read_text())

    return measured


def test_drafts_stand_beside_the_figures(measure, pair, capsys, caplog):
    figures = measure("--speculative")
    drafts = figures[pair[1]]["speculative"]
    assert "Passing `generation_config`" not in caplog.text
    assert set(drafts) == {"greedy", "sampled"}
    for way in drafts.values():
        assert Speculation(**way).tokens_per_second > 0
        assert 0 <= way["drafts_used"] <= way["acceptance"] <= 1
    assert "speculative" not in figures["teacher"]
    shown = capsys.readouterr().out
    assert "\u2026" not in shown  # no name is cut
    cells = [line.split("│")[1].strip() for line in shown.splitlines() if "│" in line]
    assert "speculative.greedy.tokens_per_second_alone" in "".join(cells)


def test_each_teacher_has_figures_of_its_own_in_the_same_shape(measure, pair, tmp_path, capsys):
    alone = measure()
    other = str(tmp_path / "other")
    toy.teacher_model(seed=8).save_pretrained(other)
    toy.tokenizer().save_pretrained(other)
    both = measure("--teacher", other)
    assert set(both) == {"teachers"}
    assert list(both["teachers"]) == [pair[0], other]
    for name in (pair[1], "teacher"):
        first, second = (both["teachers"][teacher][name] for teacher in (pair[0], other))
        assert first["kl_teacher_text"] == alone[name]["kl_teacher_text"]
        assert set(first) == set(second) == set(alone[name])
    kl = [one[pair[1]]["kl_teacher_text"] for one in both["teachers"].values()]
    assert kl[0] != kl[1]
    assert f"Figures against {other} on" in " ".join(capsys.readouterr().out.split())


def test_the_start_has_forgotten_nothing_and_others_have(measure, pair, tmp_path):
    moved = str(tmp_path / "moved")
    toy.model(seed=3).save_pretrained(moved)
    toy.tokenizer().save_pretrained(moved)
    figures = measure("--start", pair[1], students=(pair[1], moved))
    same, other = (figures[name]["forgetting"] for name in (pair[1], moved))
    assert same["kl_start_text"] == 0.0 < other["kl_start_text"]
    assert same["perplexity_before"] == same["perplexity_after"] == other["perplexity_before"]
    assert other["perplexity_after"] == pytest.approx(figures[moved]["perplexity"], rel=1e-3)
    assert "forgetting" not in figures["teacher"]


def test_forgetting_can_be_measured_on_other_rows(measure, pair, tmp_path):
    write_jsonl(tmp_path / "general.jsonl", toy.rows(2, seed=4))
    options = ("--start", pair[1], "--forget-data", f"{tmp_path}/general.jsonl")
    found, usual = measure(*options)[pair[1]], measure("--start", pair[1])[pair[1]]
    before = [one["forgetting"]["perplexity_before"] for one in (found, usual)]
    assert before[0] != before[1]
    assert found["perplexity"] == usual["perplexity"]


def test_benchmarks_are_run_with_students_and_teacher(measure, pair, tmp_path, monkeypatch, capsys):
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)
    folder = save_task(tmp_path)
    figures = measure("--tasks", "toy_choice", "--task-limit", "4", "--task-path", folder)
    for name in (pair[1], "teacher"):
        assert figures[name]["tasks"]["toy_choice"]["acc"] in (0, 0.25, 0.5, 0.75, 1)
    shown = capsys.readouterr().out
    cells = [line.split("│")[1].strip() for line in shown.splitlines() if "│" in line]
    assert "tasks.toy_choice.acc_stderr" in "".join(cells)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task-limit", "3"], "--task-limit needs --tasks"),
        (["--task-path", "folder"], "--task-path needs --tasks"),
        (["--forget-data", "rows.jsonl"], "--forget-data needs --start"),
        (["--teacher", "none"], "--teacher: 'none' is given twice"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_first(monkeypatch, capsys, options, said):
    given = ["--teacher", "none", "--data", "none.jsonl", *options]
    assert run(monkeypatch, "evaluate", "a", *given) == 2
    assert said in capsys.readouterr().err


def test_a_start_of_another_vocabulary_is_refused_before_anything_is_measured(
    monkeypatch, capsys, pair, tmp_path
):
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(3))
    other = toy.tokenizer()
    other.add_tokens(["<|tool|>"])
    toy.model().save_pretrained(tmp_path / "start")
    other.save_pretrained(tmp_path / "start")
    monkeypatch.setattr("llmdistill.cli.measured.Evaluation", None)
    given = ["--data", f"{tmp_path}/rows.jsonl", "--start", f"{tmp_path}/start"]
    assert run(monkeypatch, "evaluate", pair[1], "--teacher", pair[0], *given) == 2
    assert "do not share a vocabulary" in " ".join(capsys.readouterr().err.split())
