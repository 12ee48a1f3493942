"""SIGTERM, sent to the process itself while it trains."""

from __future__ import annotations

import signal

import pytest
from transformers import TrainerCallback

from llmdistill.errors import StoppedError
from llmdistill.training import seal, stopping
from tests.training.helpers import dataset, trainer


class Signals(TrainerCallback):
    """Sends SIGTERM at the start of a step, once or more often."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGTERM)


def stopped(folder, *, times=1, **options):
    options = {"rows": dataset(12), "max_steps": 9} | options
    run = trainer(folder, callbacks=[Signals(1, times)], **options)
    with pytest.raises(StoppedError, match="after step 2"):
        run.train()
    return [path.name for path in seal.numbered(folder) if seal.is_sealed(path)]


def test_a_signal_that_comes_twice_at_once_saves_too(tmp_path):
    """Schedulers and launchers both send one."""
    before = signal.getsignal(signal.SIGTERM)
    assert stopped(tmp_path, times=3) == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_signal_ends_the_process(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(stopping, "AGAIN", -1.0)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        stopped(tmp_path, times=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]


@pytest.mark.parametrize(
    "options",
    [
        {"save_strategy": "epoch"},  # step 2 is no end of an epoch
        {"save_strategy": "epoch", "rows": dataset(8)},  # it is one, and is saved once
        {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
    ],
)
def test_the_checkpoint_of_the_last_step_stays(tmp_path, options):
    assert stopped(tmp_path, **options)[-1] == "checkpoint-2"


def test_it_stays_although_another_student_is_the_best(tmp_path):
    options = {
        "eval_dataset": dataset(4, seed=3), "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1,
        "save_total_limit": 1, "learning_rate": 20.0,
    }  # fmt: skip
    assert "checkpoint-2" in stopped(tmp_path / "steps", **options)
    assert "checkpoint-2" in stopped(tmp_path / "best", **options | {"save_strategy": "best"})


def test_a_run_that_fails_gives_the_signal_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run = trainer(tmp_path)
    run.model.forward = None
    with pytest.raises(TypeError):
        run.train()
    assert signal.getsignal(signal.SIGTERM) is before
