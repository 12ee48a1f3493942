"""Callbacks of a run: what it shows, samples and metrics it writes, and what follows a step."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from llmdistill import run_folder
from llmdistill.batch import Prompts
from llmdistill.protocols import Follows
from llmdistill.sampling import GREEDY, Draw

logger = logging.getLogger("llmdistill")

LOGGED_CHARACTERS = 160  # of a sample: one or two lines of a terminal


class ProgressBar(TrainerCallback):
    """One line on a terminal: steps, time left, and the figures of the last log.

    They are the loss, the held-out KL, the accepted share of drafted tokens, the predicted tokens
    per second, and the memory in use.  Only the first rank shows it, and a log file has no bar.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._since = 0.0
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr,
                disable=None, dynamic_ncols=True,  # None: off if stderr is no terminal
            )  # fmt: skip
            self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._bar is None or not logs:
            return
        for key, name in (("loss", "loss"), ("eval_kl", "held-out KL"), ("acceptance", "accepted")):
            if key in logs:
                self._shown[name] = f"{logs[key]:.3f}"
        if "predicted_tokens" in logs:
            now = time.perf_counter()
            self._shown["tokens/s"] = f"{logs['predicted_tokens'] / (now - self._since):.0f}"
            self._since = now
        self._shown["GB"] = f"{memory_in_use() / 1e9:.1f}"
        self._bar.set_postfix(self._shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def memory_in_use() -> int:
    """Return the bytes that this process has on its GPU, or in main memory if it uses none."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


class Samples(TrainerCallback):
    """Lets the student answer a few held-out prompts every so many steps.

    The answers are greedy.  They are logged, and added to a file as one line of JSON for each
    prompt.  All ranks write, because weights may be spread over them; the first one reports.
    """

    def __init__(
        self, path: Path, prompts: Prompts, shown: Sequence[str], *, every: int, max_new_tokens: int
    ) -> None:
        self.path, self.prompts, self.shown = path, prompts, shown
        self.every, self.max_new_tokens = every, max_new_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _forget_after(self.path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        model = kwargs["model"]
        options = {"max_new_tokens": self.max_new_tokens, "draw": Draw(args.seed)}
        write = partial(model.write, self.prompts, GREEDY, **options)
        responses = model.with_whole_weights(write).responses()
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, ids in zip(self.shown, responses, strict=True):
                text = model.tokenizer.decode(ids, skip_special_tokens=True)
                logger.info("step %d: %s -> %s", state.global_step, _short(prompt), _short(text))
                line = {"step": state.global_step, "prompt": prompt, "response": text}
                file.write(json.dumps(line) + "\n")


def _short(text: str) -> str:
    """Return the beginning of a text on one line."""
    return shorten(text, LOGGED_CHARACTERS, placeholder=" ...")


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
    """Writes each log as one line of JSON, on the first rank only.

    `seconds` is the time since training began, without what came before a run was stopped and after
    its last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = _forget_after(self.path, state.global_step)
            spent = json.loads(kept[-1]).get("seconds", 0.0) if kept else 0.0
            self._began = time.perf_counter() - spent

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            seconds = round(time.perf_counter() - self._began, 3)
            with self.path.open("a", encoding="utf-8") as file:
                line = {"step": state.global_step, **logs, "seconds": seconds}
                file.write(json.dumps(line) + "\n")


def _forget_after(path: Path, step: int) -> list[str]:
    """Remove the lines of a file that a run will write again; return the others.

    A run that died after its last checkpoint makes the steps after it once more, and a run that
    starts again makes all of them.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= (step or -1)]
    path.write_text("".join(kept), encoding="utf-8")
    return kept


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
