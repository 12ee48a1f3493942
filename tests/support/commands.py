"""Commands of llmdistill, run in the process of the test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmdistill.cli import main
from tests import toy
from tests.support.files import write_jsonl


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run a command and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["llmdistill", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def short_recipe(folder: Path, pair: tuple[str, str]) -> Path:
    """Write a recipe of one step with a checkpoint, and its rows; return its path."""
    teacher, student = pair
    write_jsonl(folder / "train.jsonl", toy.rows(6))
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder}/run\n"
        f"teacher: {{model: {teacher}}}\n"
        f"student: {{model: {student}}}\n"
        f"data: {{train: {folder}/train.jsonl, hold_back: 2}}\n"
        "training: {max_steps: 1, use_cpu: true, per_device_train_batch_size: 2, "
        "dataloader_pin_memory: false, save_strategy: steps, save_steps: 1}\n"
        "evaluate: {max_new_tokens: 5}\n"
    )
    return path
