"""A task of lm-eval in local files: a YAML file and its rows."""

from __future__ import annotations

import random
from pathlib import Path

import yaml

from tests import toy
from tests.support.files import write_jsonl

_draw = random.Random(0)
ROWS = [
    {
        "question": " ".join(_draw.sample(toy.WORDS, 3)),
        "choices": _draw.sample(toy.WORDS, 3),
        "answer": _draw.randrange(3),
    }
    for _ in range(9)
]


def save_task(folder: Path, name: str = "toy_choice") -> str:
    """Save the task with its rows; return the folder, for the option that names it."""
    write_jsonl(folder / f"{name}.jsonl", ROWS)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/{name}.jsonl"}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(folder)
