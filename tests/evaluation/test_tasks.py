"""Benchmarks of lm-eval: a task in local files gives what plain loops give, and errors are clear."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from llmdistill.errors import RecipeError
from llmdistill.evaluation.tasks import Benchmarks
from tests import toy
from tests.support.tasks import ROWS, save_task


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    # Reading lm-eval's own tasks takes 12 seconds.
    manager = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)
    return save_task(tmp_path)


def best(model, row) -> int:
    """The choice with the highest log-likelihood behind the question, by plain loops."""
    ids = toy.tokenizer().encode
    scores = []
    for choice in row["choices"]:
        question, answer = ids(row["question"]), ids(f" {choice}")
        with torch.no_grad():
            logits = model(torch.tensor([[*question, *answer]])).logits[0]
        log = logits.log_softmax(-1)[len(question) - 1 : -1]
        scores.append(float(log.gather(-1, torch.tensor(answer)[:, None]).sum()))
    return scores.index(max(scores))


def test_a_local_task_gives_what_plain_loops_give(folder):
    model = toy.model()
    found = Benchmarks(["toy_choice"], folder=folder).measure(model, toy.tokenizer())
    expected = [best(model, row) == row["answer"] for row in ROWS]
    assert 0 < sum(expected) < len(expected)
    assert found["toy_choice"]["acc"] == pytest.approx(sum(expected) / len(ROWS))
    assert "acc_stderr" in found["toy_choice"]


def test_the_limit_takes_the_first_rows(folder):
    model = toy.model()
    right = [best(model, row) == row["answer"] for row in ROWS]
    # A limit at which the first rows do better or worse than all.
    limit = next(n for n in range(2, len(ROWS)) if sum(right[:n]) / n != sum(right) / len(ROWS))
    found = Benchmarks(["toy_choice"], limit=limit, folder=folder).measure(model, toy.tokenizer())
    assert found["toy_choice"]["acc"] == pytest.approx(sum(right[:limit]) / limit)


def test_an_unknown_task_is_named_before_anything_is_measured(folder):
    with pytest.raises(RecipeError, match="lm-eval knows no task 'arc_hard'"):
        Benchmarks(["toy_choice", "arc_hard"], folder=folder)


def test_a_task_that_fails_says_why(folder, tmp_path):
    (tmp_path / "toy_choice.jsonl").unlink()
    with pytest.raises(RecipeError, match="lm-eval cannot run toy_choice: .*toy_choice.jsonl"):
        Benchmarks(["toy_choice"], folder=folder).measure(toy.model(), toy.tokenizer())


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'llmdistill\[lm-eval\]'"):
        Benchmarks(["arc_easy"])
