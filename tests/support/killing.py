"""Starts a run again and again and kills it at random moments, until it ends by itself.

Processes are forked from one that has imported everything, so that a start takes no time.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

LOADED = ["tests.support.loaded"]
STOPPED = 128 + signal.SIGTERM


def start(recipe: dict, log: Path) -> multiprocessing.Process:
    """Start a run in a separate process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=_run, args=(recipe, str(log)))
    process.start()
    return process


def kill_until_done(recipe: dict, log: Path, *, kills: int, seed: int) -> list[int]:
    """Run a recipe, with `kills` kills at random moments; return the step that each one saw done.

    One kill in five comes while models are loaded, the others up to two steps later.
    """
    draw, seen = random.Random(seed), []
    folder = Path(recipe["output"])
    while len(seen) < kills:
        process = start(recipe, log)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 1))
        else:
            wait_for_steps(folder, steps_of(folder) + draw.randint(0, 1), process)
            time.sleep(draw.uniform(0, 0.2))
        if process.exitcode is not None:
            assert process.exitcode == 0, log.read_text()
            break  # it has ended before it could be killed
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        seen.append(steps_of(folder))
    process = start(recipe, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return seen


def steps_of(folder: Path) -> int:
    """Count the lines about steps that a run has logged."""
    file = folder / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.is_file() else 0


def wait_for_steps(folder: Path, number: int, process: multiprocessing.Process) -> None:
    """Wait until a run has logged so many steps."""
    for _ in range(3000):
        if steps_of(folder) >= number or not process.is_alive():
            return
        time.sleep(0.01)
    raise TimeoutError(f"{folder} has logged {steps_of(folder)} steps")


def _run(recipe: dict, log: str) -> None:
    import sys

    import torch

    from llmdistill import recipe as recipes
    from llmdistill.errors import StoppedError
    from llmdistill.run import distill

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path(log).open("a")  # noqa: SIM115
    try:
        distill(recipes.build(recipe), show_progress=False)
    except StoppedError as error:
        print(error, flush=True)
        raise SystemExit(STOPPED) from error
