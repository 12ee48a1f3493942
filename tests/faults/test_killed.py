"""R3, R7: a run that is killed or stopped at any moment, and started again, is the same run."""

from __future__ import annotations

import logging
import os
import signal
from itertools import pairwise

import pytest
import safetensors.torch
import torch

from llmdistill import recipe as recipes
from llmdistill.run import distill
from tests import toy
from tests.support.files import read_jsonl, write_jsonl
from tests.support.killing import STOPPED, kill_until_done, start, wait_for_steps

pytestmark = pytest.mark.slow


@pytest.fixture
def given(pair, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(12))
    return {
        "output": str(tmp_path / "run"),
        "teacher": {"model": pair[0], "dtype": "float32"},
        "student": {"model": pair[1]},
        "data": {"train": str(tmp_path / "rows.jsonl"), "hold_back": 2},
        "rollout": {"kind": "sampled", "by": "student", "max_new_tokens": 6},
        "evaluate": {"max_new_tokens": 3},
        "training": {
            "use_cpu": True, "max_steps": 30, "save_steps": 1, "save_total_limit": 2,
            "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        },
    }  # fmt: skip


def student(folder):
    return safetensors.torch.load_file(folder / "student" / "model.safetensors")


def test_a_run_that_is_killed_twenty_times_is_the_same_run(given, tmp_path):
    straight = given | {"output": str(tmp_path / "straight")}
    distill(recipes.build(straight), show_progress=False)
    seen = kill_until_done(given, tmp_path / "log", kills=20, seed=0)
    assert len(seen) == 20
    assert len(set(seen)) > 5, seen
    # A start that made all steps again would fall back by more than the one that was not saved.
    assert all(later >= earlier - 1 for earlier, later in pairwise(seen)), seen
    ours, theirs = student(tmp_path / "run"), student(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [
        [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
        for folder in (tmp_path / "run", tmp_path / "straight")
    ]
    assert [line["step"] for line in lines[0]] == list(range(1, 31))
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


def test_sigterm_saves_and_the_same_command_goes_on(given, tmp_path, caplog):
    given["training"]["save_strategy"] = "no"  # a checkpoint is written although none is asked for
    process = start(given, tmp_path / "log")
    wait_for_steps(tmp_path / "run", 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == STOPPED, (tmp_path / "log").read_text()
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 3 <= step < 30
    assert f"SIGTERM ended the run after step {step}" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run" / "student").exists()
    with caplog.at_level(logging.INFO, logger="llmdistill"):
        distill(recipes.build(given), show_progress=False)
    assert f"resuming from {saved}" in caplog.text
    steps = [line["step"] for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 31))
    distill(recipes.build(given | {"output": str(tmp_path / "straight")}), show_progress=False)
    ours, theirs = student(tmp_path / "run"), student(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
