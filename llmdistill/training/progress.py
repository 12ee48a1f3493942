"""Callbacks of a run: a progress bar, metrics.jsonl, the time of steps, and what follows a step."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from llmdistill import run_folder
from llmdistill.protocols import Follows


class ProgressBar(TrainerCallback):
    """Shows finished steps and time left, with the loss and the predicted tokens per second.

    Only the first rank shows it.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr
            )
            self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._bar is not None and logs and "predicted_tokens" in logs:
            now = time.perf_counter()
            speed = logs["predicted_tokens"] / (now - self._since)
            self._since = now
            shown = {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{speed:.0f}"}
            if "acceptance" in logs:
                shown["accepted"] = f"{logs['acceptance']:.2f}"
            self._bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class AfterStep(TrainerCallback):
    """Lets a teacher that follows the student know that a step is done."""

    def __init__(self, teacher: Follows) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.teacher.after_step()


class StepClock(TrainerCallback):
    """Records the seconds of each step, including its rollout."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now


class MetricsFile(TrainerCallback):
    """Writes each log as one line of JSON, on the first rank only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run that died after its last checkpoint makes the steps after it once more.
        if state.is_world_process_zero and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            last = state.global_step or -1  # a run that starts again makes all of them once more
            kept = [line for line in lines if _step_of(line) <= last]
            self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _step_of(line: str) -> float:
    """Return the step of a line; infinity if a kill has cut it off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


class OldRun(TrainerCallback):
    """Deletes the overwritten run when the new one has its first checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            run_folder.discard_old(self.folder)
