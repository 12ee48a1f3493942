"""Losses of twenty steps with each objective and each teacher on toys, kept in golden.json.

    python -m tests.conformance.golden [NAME ...]

writes those that are missing, and writes again those that are named, after a change that is meant to
change them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmdistill.objectives.build import build_objectives
from tests.conformance import entries
from tests.support.teachers import every_teacher
from tests.training.helpers import dataset, trainer

FILE = Path(__file__).with_suffix(".json")
KEPT: dict[str, list[float]] = json.loads(FILE.read_text()) if FILE.is_file() else {}
STEPS = 20


def losses(folder: Path, **parts: Any) -> list[float]:
    """Return the loss of each of twenty steps with all rows."""
    options = {"rows": dataset(8), "learning_rate": 0.02, "per_device_train_batch_size": 8}
    made = trainer(folder, **options | parts | {"max_steps": STEPS})
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def parts() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what each run consists of, by its name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, one in entries.objectives().items():
        sections = entries.recipe(objectives=[one]).objectives
        found[name] = lambda sections=sections: {"objectives": build_objectives(sections)}
    rows = {"rows": dataset(7)}
    for name, options in every_teacher().items():
        found[name] = lambda options=options: options() | rows
    return found


def main(named: list[str]) -> None:
    found = dict(KEPT)
    for name, options in parts().items():
        if name in found and name not in named:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[name] = [float(f"{loss:.6g}") for loss in losses(Path(folder), **options())]
        print(name, found[name][0], found[name][-1])
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
