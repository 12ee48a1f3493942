"""Kill runs at random moments, and compare what they end with to undisturbed runs.

    python scripts/soak.py [--kills 100] [--seed 0]

One run for each way of writing that keeps something between steps, and one with a teacher that
trains along, on toy models.  Each is killed (SIGKILL) while it loads, writes, trains or saves, and
started again with the same command.  Its student must have the bits of an undisturbed run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch

from tests import toy
from tests.support.files import write_jsonl
from tests.support.killing import kill_until_done

STUDENT = {"kind": "sampled", "by": "student", "max_new_tokens": 6}
KINDS: dict[str, dict[str, Any]] = {
    "on-policy": {"rollout": STUDENT},
    "interleaved": {"rollout": {"kind": "interleaved", "block_size": 3, "max_new_tokens": 6}},
    "replay": {"rollout": {"kind": "replay", "capacity": 8, "rollout": STUDENT}},
    "trainable teacher": {"rollout": STUDENT, "teacher": {"kind": "online", "alpha": 1.0}},
}


def recipe(folder: Path, steps: int, kind: str) -> dict[str, Any]:
    """Return the recipe of one kind of run, with its output in `folder`."""
    given: dict[str, Any] = {
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "student": {"model": str(folder / "student")},
        "data": {"train": str(folder / "rows.jsonl")},
        "training": {
            "use_cpu": True, "max_steps": steps, "save_steps": 1, "save_total_limit": 2,
            "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        },
    }  # fmt: skip
    for key, value in KINDS[kind].items():
        given[key] = {**given.get(key, {}), **value}
    return given | {"output": str(folder / kind.replace(" ", "-"))}


def student(output: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(output) / "student" / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills of each kind of run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    options = parser.parse_args()
    bad = 0
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            toy.save_pair(folder)
            write_jsonl(folder / "rows.jsonl", toy.rows(12))
            given = recipe(folder, 2 * options.kills, kind)
            straight = given | {"output": str(folder / "straight")}
            kill_until_done(straight, folder / "log", kills=0, seed=0)
            seen = kill_until_done(given, folder / "log", kills=options.kills, seed=options.seed)
            ours, theirs = student(given["output"]), student(straight["output"])
            same = all(torch.equal(ours[key], theirs[key]) for key in theirs)
            print(f"{kind}: {len(seen)} kills, after {len(set(seen))} different steps: "
                  f"{'equal' if same else 'NOT EQUAL'}", flush=True)  # fmt: skip
            bad += not same or len(seen) < options.kills
    sys.exit(bad)


if __name__ == "__main__":
    main()
