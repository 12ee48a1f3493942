"""A run that cannot learn, or that trains something else, says so."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from llmdistill.batch import Sequences
from llmdistill.errors import ModelError, NonFiniteLossError, OutOfMemoryError, TrainingError
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Writer
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.guards import RolloutWatch
from llmdistill.training.launched import require_all_processes
from llmdistill.training.tally import Tally
from tests import toy
from tests.training.helpers import trainer, weights

NO_MEMORY = "CUDA out of memory. Tried to allocate 3.00 GiB."


# ---- NaN ----


def spoilt(model):
    with torch.no_grad():
        next(model.parameters())[5] = float("nan")
    return model


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("writer", [None, "student", "teacher"])
def test_weights_that_are_not_finite_are_named(tmp_path, who, writer):
    """Also if the model first writes with them."""
    models = {"student": toy.model(), "teacher": toy.teacher_model()}
    run = trainer(
        tmp_path,
        student=models["student"],
        teacher=LocalTeacher(models["teacher"], toy.tokenizer()),
        rollout=writer and SampledRollout(writer, max_new_tokens=4),
        objectives=[ResponseObjective(), CrossEntropyObjective(weight=0.1)],
    )
    spoilt(models[who])
    before = weights(run.model.student)
    with pytest.raises(NonFiniteLossError, match=f"weights of the {who} that are not finite"):
        run.train()
    after = weights(run.model.student)
    assert torch.equal(after.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_is_loaded_with_such_weights_is_refused(tmp_path, who):
    models = {"student": toy.model(), "teacher": toy.teacher_model()}
    spoilt(models[who])
    with pytest.raises(ModelError, match="weights that are not finite: model.embed_tokens.weight"):
        trainer(
            tmp_path,
            student=models["student"],
            teacher=LocalTeacher(models["teacher"], toy.tokenizer()),
        )


def test_the_objective_that_is_not_finite_is_named(tmp_path):
    class Infinite(CrossEntropyObjective):
        def forward(self, *args, **kwargs):
            total = super().forward(*args, **kwargs)
            return total._replace(total=total.total * float("inf"))

    run = trainer(tmp_path, objectives=[ResponseObjective(), Infinite()])
    with pytest.raises(NonFiniteLossError, match="from the objective 'cross_entropy'"):
        run.train()


# ---- memory ----


def test_memory_that_ends_while_writing_gives_the_key_and_a_number(tmp_path):
    run = trainer(tmp_path, rollout=SampledRollout("student", max_new_tokens=4))

    def write(*args, **kwargs):
        raise torch.OutOfMemoryError(NO_MEMORY)

    run.model.write = write
    with pytest.raises(OutOfMemoryError, match=r"4 prompts .*Set batch_size .* to 2 or less"):
        run.train()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (4, "batch_size to 2 and gradient_accumulation_steps to 2"),
        (3, "batch_size to 1 and gradient_accumulation_steps to 3"),
        (1, "data.max_prompt_tokens or max_new_tokens lower"),
    ],
)
def test_memory_that_ends_in_a_step_gives_the_key_and_a_number(tmp_path, rows, said):
    run = trainer(tmp_path, per_device_train_batch_size=rows)

    def forward(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    run.model.forward = forward
    with pytest.raises(OutOfMemoryError, match=rf"{rows} rows of up to \d+ tokens.*{said}"):
        run.train()


def test_other_errors_get_no_advice_about_memory(tmp_path):
    run = trainer(tmp_path)

    def forward(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    run.model.forward = forward
    with pytest.raises(RuntimeError, match="^shapes do not match$"):
        run.train()


# ---- processes ----


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "started one"),
        ({"WORLD_SIZE": "2"}, "started 2 processes"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "1", "WORLD_SIZE": "1"}, None),
        ({"MASTER_PORT": "29500"}, None),
        ({"WORLD_SIZE": "1", "MASTER_PORT": "29500"}, None),
    ],
)
def test_processes_that_were_not_started_are_missed(monkeypatch, variables, said):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if said is None:
        return require_all_processes()
    with pytest.raises(TrainingError, match=said):
        require_all_processes()
    return None


@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_is_noticed(tmp_path):
    """F26: it starts one process of two."""
    script = tmp_path / "script.py"
    script.write_text(
        "from llmdistill.training.launched import require_all_processes\nrequire_all_processes()\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    found = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert found.returncode != 0
    assert "was asked for several processes and started one" in found.stderr


# ---- what was written ----


def figures(responses, *, writer=Writer.STUDENT):
    tally = Tally(ends=[2])
    written = Sequences.pack(
        [[5, 6]] * len(responses), responses, range(len(responses)), writer=writer, pad_id=0
    )
    tally.add_written(written, 1.0)

    class One:
        num_processes = 1

    return tally.figures(One())


def test_useless_responses_are_counted():
    loop = [7, 8, 9] * 4 + [2]  # 10 4-grams, of which 4 are new
    found = figures([loop, [2], [10, 11, 12, 13, 14]])
    assert found["empty"] == pytest.approx(1 / 3)
    assert found["unfinished"] == pytest.approx(1 / 3)
    assert found["repeated_4grams"] == pytest.approx(6 / 12)
    assert "empty" not in figures([loop], writer=Writer.DATA)


def test_a_4gram_of_another_response_is_no_repetition():
    assert figures([[7, 8, 9, 10, 2], [7, 8, 9, 10, 2]])["repeated_4grams"] == 0
    assert figures([[7, 2], [2]])["repeated_4grams"] == 0


def test_each_kind_of_useless_responses_is_warned_about_once(caplog):
    watch = RolloutWatch()
    with caplog.at_level(logging.WARNING, logger="llmdistill"):
        for _ in range(2):
            watch({"empty": 0.6, "unfinished": 0.5, "repeated_4grams": 0.8})
    said = [record.getMessage() for record in caplog.records]
    assert [re.match(r"\d+% of the [\w-]+", one)[0] for one in said] == [
        "60% of the written", "80% of the 4-grams",
    ]  # fmt: skip
