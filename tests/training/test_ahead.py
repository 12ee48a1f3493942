"""The teacher writes ahead: before the first step, once, and only what the run will use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch

from llmdistill import recipe as recipes
from llmdistill.data.collate import PromptStream
from llmdistill.data.validate import Rules
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.mixed import MixedRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.run import distill
from llmdistill.schedules import Adaptive
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.online import OnlineTeacher
from tests import toy
from tests.support.spies import spy
from tests.training.helpers import dataset, trainer, weights


class Noting(LocalTeacher):
    """Notes (row, sample) of each response that it writes, and the step at which it writes."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.written, self.steps, self.trainer = [], [], None

    def write(self, prompts, sampling, *, draw, **options):
        samples = draw.sample if isinstance(draw.sample, tuple) else [draw.sample] * len(prompts)
        self.written += zip(prompts.row_ids_B.tolist(), samples, strict=True)
        self.steps.append(None if self.trainer is None else self.trainer.state.global_step)
        return super().write(prompts, sampling, draw=draw, **options)


def noting() -> Noting:
    return Noting(toy.teacher_model().double(), toy.tokenizer())


def sampled(**options) -> SampledRollout:
    return SampledRollout("teacher", **{"max_new_tokens": 5, "samples": 2} | options)


def made(folder, rollout, teacher, **options):
    defaults = {"rows": dataset(10), "max_steps": 5, "per_device_train_batch_size": 2}
    found = trainer(folder, rollout=rollout, teacher=teacher, **defaults | options)
    teacher.trainer = found
    return found


def used_by(made) -> set[tuple[int, int]]:
    """Train, and return (row, sample) of what training read."""
    used, rollout = set(), made.rollout
    part = rollout.other if isinstance(rollout, MixedRollout) else rollout
    old = part.write

    def write(prompts, student, teacher, progress):
        sample = progress.epoch % part.samples
        used.update((row, sample) for row in prompts.row_ids_B.tolist())
        return old(prompts, student, teacher, progress)

    part.write = write
    made.train()
    return used


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 3},  # a part of an epoch
        {"max_steps": 7},  # one epoch and a part
        {"max_steps": 4, "gradient_accumulation_steps": 2},  # the last window is smaller
        {"max_steps": -1, "num_train_epochs": 3},  # the third epoch takes the first samples again
        {"max_steps": 7, "train_sampling_strategy": "group_by_length"},
        {"max_steps": 7, "dataloader_drop_last": True, "per_device_train_batch_size": 3},
    ],
)
def test_exactly_what_training_reads_is_written_before_it(tmp_path, options):
    teacher = noting()
    ready = made(tmp_path, sampled(), teacher, **options)
    used = used_by(ready)
    assert Counter(teacher.written) == Counter(used)  # each once
    assert set(teacher.steps) == {0}
    assert len(used) > 5


def test_a_mixture_has_only_its_own_steps_written(tmp_path):
    teacher = noting()
    mixed = MixedRollout(SampledRollout(max_new_tokens=4), sampled(), share=0.5)
    used = used_by(made(tmp_path, mixed, teacher, max_steps=8))
    assert Counter(teacher.written) == Counter(used)
    assert 0 < len(used) < 16
    assert set(teacher.steps) == {0}


def test_batches_are_large_and_of_similar_length(tmp_path):
    teacher = noting()
    calls = spy(teacher, "write")
    made(tmp_path, sampled(batch_size=4), teacher, max_steps=5).train()
    lengths = [one.attention_mask_BT.sum(1) - one.num_predicted for one in calls]
    assert [len(one) for one in lengths] == [2, 4, 4]
    ordered = [int(length) for one in lengths[::-1] for length in one]
    assert ordered == sorted(ordered)


def test_the_weights_are_those_of_writing_step_by_step(tmp_path):
    """Responses do not depend on the batch that they are written in: exact in float64."""

    class Lazy(SampledRollout):
        def planned(self, progress):
            return None

    found = []
    for number, kind in enumerate((SampledRollout, Lazy)):
        teacher = noting()
        student = toy.model().double()
        rollout = kind("teacher", max_new_tokens=5, samples=2)
        ready = made(tmp_path / str(number), rollout, teacher, student=student, max_steps=7)
        ready.train()
        found.append(weights(ready.model.student))
        assert (len(set(teacher.steps)) > 1) == (kind is Lazy)
    assert torch.equal(*found)


def test_files_are_never_written_again_and_checkpoints_hold_none(tmp_path):
    """R13."""
    options = {"save_strategy": "steps", "save_steps": 2}
    made(tmp_path, sampled(), noting(), max_steps=4, **options).train()
    before = {path: path.read_bytes() for path in tmp_path.glob("responses/*/*")}
    assert len(before) >= 2
    assert not [path for path in tmp_path.glob("checkpoint-*/*") if "rollout" in path.name]
    teacher = noting()
    longer = made(tmp_path, sampled(), teacher, max_steps=7, **options)
    longer.train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in before} == before
    # The last step of the first epoch, and two steps of the second, are new.
    assert Counter(sample for _, sample in teacher.written) == {0: 2, 1: 4}


def test_a_share_that_adapts_may_need_more_and_gets_it(tmp_path):
    """The plan takes the share at the start; what another share needs is written in its step."""
    teacher = noting()
    mixed = MixedRollout(
        FixedRollout(), sampled(), share=Adaptive(start=1.0, rise=0.0, tolerance=0.0)
    )
    ready = made(tmp_path, mixed, teacher, max_steps=4)
    old = mixed._drawn
    mixed._drawn = lambda progress: mixed.other if progress.step == 3 else old(progress)
    plan = mixed.planned
    mixed.planned = lambda progress: None if progress.step == 3 else plan(progress)
    ready.train()
    assert teacher.steps == [3]
    assert len(teacher.written) == 2


def test_a_teacher_that_trains_along_writes_at_each_step(tmp_path):
    teacher = OnlineTeacher(toy.teacher_model(), toy.tokenizer())
    calls = spy(teacher, "write")
    made(tmp_path, sampled(), teacher, max_steps=3).train()
    assert len(calls) == 3
    assert not (tmp_path / "responses").exists()


def test_a_stream_is_written_some_steps_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr("llmdistill.decoding.batches.ROWS_ON_CPU", 2)  # 8 rows ahead: 4 steps
    rows = toy.rows(14)
    stream = PromptStream(
        lambda: ((f"row {i}", row) for i, row in enumerate(rows)), toy.tokenizer(), Rules()
    )
    teacher = noting()
    rollout = sampled(samples=1)
    trained = spy(rollout, "write")
    made(
        tmp_path, rollout, teacher, rows=stream, max_steps=9, dataloader_drop_last=True,
    ).train()  # fmt: skip
    # Seven steps are one pass; the second pass reads the same rows again and writes nothing.
    assert [row for one in trained for row in one.row_ids_B.tolist()] == [*range(14), 0, 1, 2, 3]
    assert sorted(teacher.written) == [(row, 0) for row in range(14)]
    assert sorted(set(teacher.steps)) == [0, 4]


# ---- a run that is killed ----

KILLED = """
import os, signal, sys
from llmdistill import recipe
from llmdistill.rollouts.kept import KeptResponses
from llmdistill.run import distill
left, old = [int(sys.argv[2])], KeptResponses.add
def add(self, *arguments):
    old(self, *arguments)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
KeptResponses.add = add
distill(recipe.load(sys.argv[1]), show_progress=False)
"""


def a_run(base):
    toy.save_pair(base)
    (base / "rows.jsonl").write_text("\n".join(map(json.dumps, toy.rows(12))))
    return recipes.build({
        "output": f"{base}/run",
        "teacher": {"model": f"{base}/teacher", "dtype": "float32"},
        "student": {"model": f"{base}/student"},
        "data": {"train": f"{base}/rows.jsonl"},
        "rollout": {"kind": "sampled", "by": "teacher", "max_new_tokens": 6, "batch_size": 2},
        "training": {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 4},
    })  # fmt: skip


@pytest.mark.slow
def test_nothing_is_lost_if_it_is_killed_while_the_teacher_writes(tmp_path):
    """R13."""
    recipe = a_run(tmp_path)
    (tmp_path / "r.yaml").write_text(recipes.dump(recipe))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r.yaml"), "4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    before = {path: path.read_bytes() for path in tmp_path.glob("run/responses/*/*.arrow")}
    assert len(before) == 4
    distill(recipe, show_progress=False)
    after = {path: path.read_bytes() for path in tmp_path.glob("run/responses/*/*.arrow")}
    assert {path: after[path] for path in before} == before
    assert len(after) == 6  # 12 rows, two at a time
    straight = tmp_path / "straight"
    distill(recipe.model_copy(update={"output": str(straight)}), show_progress=False)
    ours, theirs = (
        (folder / "student" / "model.safetensors").read_bytes()
        for folder in (tmp_path / "run", straight)
    )
    assert ours == theirs
    assert os.path.exists(straight / "responses")
