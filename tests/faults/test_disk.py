"""R5, R6: a disk that is full, and a student that is saved in several files."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedModel

from llmdistill.errors import CheckpointError
from llmdistill.training import seal
from tests import toy
from tests.support.checkpoints import STEPS, made, resumed
from tests.support.files import write_jsonl
from tests.training.helpers import weights


@pytest.mark.slow
def test_a_command_on_a_full_disk_says_so_and_is_continued_later(pair, tmp_path):
    """R6: the system lets no file grow larger than a limit, as a full disk would."""
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(12))
    recipe = {
        "output": str(tmp_path / "run"),
        "teacher": {"model": pair[0], "dtype": "float32"},
        "student": {"model": pair[1]},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "training": {
            "use_cpu": True,
            "max_steps": 2,
            "save_steps": 1,
            "save_total_limit": 1,
            "lr_scheduler_type": "constant",
        },  # a longer run has the same first steps
    }

    def command(steps, most=resource.RLIM_INFINITY):
        recipe["training"]["max_steps"] = steps
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write is then an error
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        line = [sys.executable, "-m", "llmdistill", "train", str(tmp_path / "recipe.yaml")]
        return subprocess.run(
            line, capture_output=True, text=True, check=False, timeout=200, preexec_fn=limit
        )

    assert command(2).returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    student = (checkpoints / "checkpoint-2" / "model.safetensors").stat().st_size
    optimizer = (checkpoints / "checkpoint-2" / "optimizer.pt").stat().st_size
    assert student < optimizer
    failed = command(4, most=(student + optimizer) // 2)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "Traceback" not in failed.stderr
    words = " ".join(failed.stderr.replace("│", " ").split())
    assert "cannot write the checkpoint" in words
    assert "checkpoint-3" in words
    assert "GB are free there now" in words
    assert [folder.name for folder in seal.numbered(checkpoints)] == ["checkpoint-2"]
    seal.require_sealed(checkpoints / "checkpoint-2")
    assert command(4).returncode == 0
    again = safetensors.torch.load_file(tmp_path / "run/student/model.safetensors")
    recipe["output"] = str(tmp_path / "straight")
    assert command(4).returncode == 0
    straight = safetensors.torch.load_file(tmp_path / "straight/student/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in straight.items())


@pytest.fixture
def in_shards(monkeypatch):
    """Students are saved in files of at most 30 KB."""
    save = PreTrainedModel.save_pretrained

    def in_parts(self, folder, **options):
        save(self, folder, **options | {"max_shard_size": "30KB"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", in_parts)


def test_a_missing_shard_is_named_and_the_checkpoint_before_it_is_used(in_shards, tmp_path, caplog):
    """R5."""
    straight = made(tmp_path / "run")
    straight.train()
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{STEPS}")
    shards = sorted((tmp_path / "run" / "checkpoint-3").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"has lost its file {shards[1].name}"):
        resumed(tmp_path / "run", newest=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(resumed(tmp_path / "run"), weights(straight.model))
    assert shards[1].name in caplog.text


@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json", "rollout.json"])
def test_an_empty_file_is_named(tmp_path, name):
    """R5."""
    made(tmp_path).train()
    (tmp_path / "checkpoint-3" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=name):
        resumed(tmp_path, newest=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_any_error_of_the_disk_is_told_with_the_path(tmp_path, monkeypatch, code):
    """R4, R6: while the manifest is written, which is last."""

    def broken(path):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(seal, "_to_disk", broken)
    with pytest.raises(CheckpointError, match="checkpoint-1: .*GB are free there now"):
        made(tmp_path).train()
    assert not seal.numbered(tmp_path)
