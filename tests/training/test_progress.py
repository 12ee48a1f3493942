"""What a run writes and shows while it trains."""

from __future__ import annotations

import io
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmdistill.batch import Prompts
from llmdistill.training.progress import MetricsFile, ProgressBar, Samples
from tests.support.files import read_jsonl
from tests.training.helpers import dataset, trainer

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
PROMPTS = Prompts.pack([[5, 6, 7], [8, 9]], [0, 1], pad_id=0)


def watched(folder, *callbacks, **options):
    return trainer(folder / "run", callbacks=list(callbacks), **SAVED | options)


def samples(folder) -> Samples:
    return Samples(folder / "samples.jsonl", PROMPTS, ["a", "b"], every=1, max_new_tokens=4)


def test_time_goes_on_where_a_resumed_run_left_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    watched(tmp_path, MetricsFile(path), max_steps=2).train()
    first = read_jsonl(path)
    assert first[-1]["seconds"] > 0
    # As if the first two steps had taken an hour.
    path.write_text("".join(f'{{"step": {n}, "seconds": {3600 + n}}}\n' for n in (1, 2)))
    watched(tmp_path, MetricsFile(path)).train(resume_from_checkpoint=True)
    times = [line["seconds"] for line in read_jsonl(path)]
    assert times == sorted(times)
    assert 3602 < times[2] < 3700


def test_samples_are_written_again_from_the_step_that_a_run_goes_on_from(tmp_path):
    watched(tmp_path, samples(tmp_path)).train()
    straight = read_jsonl(tmp_path / "samples.jsonl")
    assert [line["step"] for line in straight] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [line["prompt"] for line in straight[:2]] == ["a", "b"]
    saved = str(tmp_path / "run" / "checkpoint-2")
    watched(tmp_path, samples(tmp_path)).train(resume_from_checkpoint=saved)
    assert read_jsonl(tmp_path / "samples.jsonl") == straight


def test_samples_change_nothing_in_a_run(tmp_path):
    losses = []
    for callbacks in ([], [samples(tmp_path)]):
        made = watched(tmp_path, *callbacks)
        made.train()
        losses.append([line["loss"] for line in made.state.log_history if "loss" in line])
        assert made.model.training
    assert losses[0] == losses[1]


@pytest.mark.parametrize("every", [1, 3, 10])
def test_all_tokens_are_counted_however_often_a_run_logs(tmp_path, every):
    """Four steps of 4 rows read the 8 rows twice."""
    made = watched(tmp_path, logging_steps=every, max_steps=4)
    made.train()
    log = made.state.log_history
    expected = 2 * sum(len(row.response_ids) for row in made.train_dataset.rows)
    assert sum(line.get("predicted_tokens", 0) for line in log) == expected


def test_tensorboard_gets_what_is_logged(tmp_path):
    options = {"eval_dataset": dataset(3), "eval_strategy": "steps", "eval_steps": 2}
    made = watched(tmp_path, report_to="tensorboard", **options)
    made.train()
    [file] = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file)).Reload()
    losses = [event.value for event in found.Scalars("train/loss")]
    logged = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert losses == pytest.approx(logged)
    for name in ("train/student_token_share", "eval/kl", "eval/draft_acceptance"):
        assert found.Scalars(name), name


class Terminal(io.StringIO):
    """A stream that says what it is."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def shown(monkeypatch, *, is_terminal: bool, is_first: bool = True) -> str:
    stream = Terminal(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    state = types.SimpleNamespace(is_world_process_zero=is_first, max_steps=4, global_step=0)
    bar = ProgressBar()
    bar.on_train_begin(None, state, None)
    state.global_step = 1
    bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, {"loss": 2.5, "predicted_tokens": 80.0, "acceptance": 0.75})
    bar.on_log(None, state, None, {"eval_loss": 1.0, "eval_kl": 0.25})
    bar.on_train_end(None, state, None)
    return stream.getvalue()


def test_a_terminal_shows_one_line_of_figures(monkeypatch):
    line = shown(monkeypatch, is_terminal=True).split("\r")[-1]
    for part in ("1/4", "loss=2.500", "held-out KL=0.250", "accepted=0.750", "tokens/s=", "GB="):
        assert part in line, part


def test_a_log_file_and_other_ranks_show_no_bar(monkeypatch):
    assert shown(monkeypatch, is_terminal=False) == ""
    assert shown(monkeypatch, is_terminal=True, is_first=False) == ""
