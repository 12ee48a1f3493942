"""Losses of twenty steps with each objective on the toy pair, kept in golden.json.

    python -m tests.conformance.golden

writes them again, after a change that is meant to change them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from llmdistill.objectives.build import build_objectives
from tests.conformance import entries
from tests.training.helpers import dataset, trainer

FILE = Path(__file__).with_suffix(".json")
KEPT: dict[str, list[float]] = json.loads(FILE.read_text()) if FILE.is_file() else {}
STEPS = 20


def losses(folder: Path, objectives: list) -> list[float]:
    """Return the loss of each of twenty steps with all rows."""
    options = {"max_steps": STEPS, "learning_rate": 0.02, "per_device_train_batch_size": 8}
    made = trainer(folder, rows=dataset(8), objectives=objectives, **options)
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def main() -> None:
    found = {}
    for name, section in entries.objectives().items():
        built = build_objectives(entries.recipe(objectives=[section]).objectives)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = [float(f"{loss:.6g}") for loss in losses(Path(folder), built)]
        print(name, found[name][0], found[name][-1])
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
