"""A checkpoint that is not whole is never loaded, and what was whole before it is used."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch

from llmdistill.errors import CheckpointError
from llmdistill.training import checkpoint, seal
from tests import toy
from tests.support.checkpoints import STEPS, made, resumed
from tests.training.helpers import weights

# All that a run can have in a checkpoint: a projector, a rollout with a memory, AdamW, a schedule.
FILES = (
    "config.json", "generation_config.json", "manifest.json", "model.safetensors",
    "objectives.safetensors", "optimizer.pt", "rng_state.pth", "rollout.json", "scheduler.pt",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trainer_state.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an undisturbed run, and the weights at its end."""
    folder = tmp_path_factory.mktemp("straight")
    run = made(folder)
    run.train()
    return folder, weights(run.model)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-len(data) // 4 - 1] ^= 0x55
    file.write_bytes(bytes(data))


HARMS = {"missing": lambda file: file.unlink(), "truncated": cut, "flipped": flip}


def test_all_files_of_a_checkpoint_are_harmed_below(straight):
    folder, _ = straight
    assert sorted(file.name for file in (folder / "checkpoint-3").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(
    straight, tmp_path, caplog, name, harm
):
    """R5."""
    folder, expected = straight
    run = tmp_path / "run"
    for step in (2, 3):
        shutil.copytree(folder / f"checkpoint-{step}", run / f"checkpoint-{step}")
    HARMS[harm](run / "checkpoint-3" / name)
    # A manifest with a wrong hash blames the file that the hash is of.
    said = "checkpoint-3" if (name, harm) == ("manifest.json", "flipped") else name
    with pytest.raises(CheckpointError, match=f"checkpoint-3.*{said}|{said}"):
        resumed(run, newest=str(run / "checkpoint-3"))
    assert torch.equal(resumed(run), expected)
    assert "a checkpoint was skipped" in caplog.text
    assert said in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_again(straight, tmp_path):
    """R5."""
    shutil.copytree(straight[0], tmp_path / "run")
    for step in range(1, STEPS + 1):
        flip(tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole") as caught:
        resumed(tmp_path / "run")
    assert str(caught.value).count("optimizer.pt has changed since it was saved") == STEPS


@pytest.mark.parametrize("written", range(len(FILES)))
def test_a_run_that_is_killed_at_any_file_of_a_save_ends_the_same(straight, tmp_path, written):
    """R3: the files of a save in the order in which they were written, the last one cut off."""
    folder, expected = straight
    run = tmp_path / "run"
    shutil.copytree(folder / "checkpoint-2", run / "checkpoint-2")
    half = run / "checkpoint-3"
    half.mkdir()
    files = sorted((folder / "checkpoint-3").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert files[-1].name == "manifest.json"  # it is written last, and under another name
    for file in files[:written]:
        shutil.copy(file, half)
    if written:
        cut(half / files[written - 1].name)
    assert torch.equal(resumed(run), expected)
    for step in (3, 4):  # the half one was replaced
        assert seal.require_sealed(run / f"checkpoint-{step}").step == step


def test_an_error_in_a_save_leaves_nothing_and_the_one_before_is_whole(
    straight, tmp_path, monkeypatch
):
    """R4, R6, R8: also if only one checkpoint may be kept."""
    save_parts = checkpoint.save_parts

    def full(distillation, folder, state=None):
        if folder.name == "checkpoint-3":
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        save_parts(distillation, folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_parts", full)
        with pytest.raises(CheckpointError, match=r"checkpoint-3: .*No space left.* GB are free"):
            made(tmp_path, save_total_limit=1).train()
    assert [file.name for file in seal.numbered(tmp_path)] == ["checkpoint-2"]
    assert torch.equal(resumed(tmp_path, save_total_limit=1), straight[1])
    assert [file.name for file in seal.numbered(tmp_path)] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("newest", [True, "checkpoint-2"])
def test_a_checkpoint_without_the_optimizer_is_not_resumed(tmp_path, newest):
    """Nor is the run started again in its place."""
    made(tmp_path, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="training.save_only_model"):
        resumed(tmp_path, newest=newest if newest is True else str(tmp_path / newest))


def test_later_checkpoints_are_set_aside_if_an_older_one_is_named(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    resumed(run, newest=str(run / "checkpoint-2"))
    assert sorted(path.name for path in run.glob("*.aside")) == [
        "checkpoint-3.aside", "checkpoint-4.aside",
    ]  # fmt: skip
    assert [path.name for path in seal.numbered(run)] == [
        f"checkpoint-{step}" for step in range(1, STEPS + 1)
    ]


def test_half_checkpoints_do_not_count_when_old_ones_are_deleted(straight, tmp_path):
    for step in (1, 2):
        shutil.copytree(straight[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    half = tmp_path / "checkpoint-9"
    half.mkdir()
    (half / "model.safetensors").touch()
    seal.keep_newest(tmp_path, 1, [tmp_path / "checkpoint-2"])
    assert [path.name for path in seal.numbered(tmp_path)] == ["checkpoint-2", "checkpoint-9"]


def test_another_number_of_processes_cannot_share_a_buffer(straight, tmp_path):
    shutil.copytree(straight[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"world_size": 4}))
    with pytest.raises(CheckpointError, match="saved by 4 processes, and there are 1 now"):
        resumed(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": toy.rows(11)}, "the rows"),
        ({"per_device_train_batch_size": 2}, r"rows in a step \(4 then, 2 now\)"),
        ({"learning_rate": 2e-2}, r"learning rate \(0.01 then, 0.02 now\)"),
        ({"seed": 5}, r"seed \(42 then, 5 now\)"),
    ],
)
def test_what_the_run_depends_on_is_compared(straight, tmp_path, change, said):
    """R9."""
    shutil.copytree(straight[0], tmp_path / "run")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=said):
        resumed(tmp_path / "run", max_steps=6, **change)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_another_teacher_is_noticed(straight, tmp_path):
    """R9."""
    from llmdistill.teachers.local import LocalTeacher

    shutil.copytree(straight[0], tmp_path / "run")
    other = toy.teacher_model()
    with torch.no_grad():
        other.model.layers[-1].mlp.down_proj.weight.mul_(1.001)
    teacher = LocalTeacher(other, toy.tokenizer())
    with pytest.raises(CheckpointError, match="differs from this one in the teacher"):
        resumed(tmp_path / "run", max_steps=6, teacher=teacher)


def test_a_manifest_of_another_format_is_refused(straight, tmp_path):
    shutil.copytree(straight[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    file = tmp_path / "checkpoint-3" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, and this version reads 1"):
        seal.require_sealed(tmp_path / "checkpoint-3")
