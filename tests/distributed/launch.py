"""Start worker.py on two ranks: once for all cases that can share a process, or for one case."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import toy
from tests.distributed import sharded, worker
from tests.support.files import write_jsonl
from tests.support.machine import with_python_path

ROOT = Path(__file__).parents[2]
GROUPS = (worker.TOGETHER, sharded.TOGETHER)
NUM_ROWS = {"whole_run": 12, "measured": 12, "sharded_teacher": 10, "zero3_measured": 12}


def launched(
    *places: Path, stop_at: str | None = None, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run cases of worker.py on two ranks, one after the other, each in the folder of its name.

    If the file `stop_at` appears in the first folder, the launcher gets SIGTERM.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "-m", "tests.distributed.worker", *map(str, places),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": with_python_path(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        if stop_at is not None:
            while not (places[0] / stop_at).is_file() and process.poll() is None:
                time.sleep(0.05)
            process.terminate()
        try:
            printed, told = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed, told)


def two_ranks(*places: Path) -> None:
    """Launch the ranks once for these cases, which must succeed."""
    done = launched(*places)
    assert done.returncode == 0, _tail(done)


class Launches:
    """Where cases have run on two ranks.

    The cases of a group share a launch, which starts when a test asks for the first of them.  Cases
    that no selected test wants are left out.
    """

    def __init__(self, root: Path, wanted: set[str]) -> None:
        self.root, self.wanted = root, wanted
        self.ends: dict[tuple[str, ...], subprocess.CompletedProcess[str]] = {}

    def folder(self, case: str) -> Path:
        """Return the folder of a case, or fail with what the launcher told."""
        group = next((names for names in GROUPS if case in names), (case,))
        cases = tuple(one for one in group if one in self.wanted)
        if cases not in self.ends:
            self.ends[cases] = self._launched(cases)
        done = self.ends[cases]
        ended = (self.root / case / worker.DONE).is_file()
        assert ended, f"the case {case} did not end well:\n{_tail(done)}"
        # What fails after all cases fails the last one.
        assert done.returncode == 0 or case != cases[-1], _tail(done)
        return self.root / case

    def _launched(self, cases: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        for case in cases:
            if case in NUM_ROWS:
                toy.save_pair(self.root / case / "pair")
                write_jsonl(self.root / case / "rows.jsonl", toy.rows(NUM_ROWS[case]))
        return launched(*(self.root / case for case in cases), seconds=240 + 30 * len(cases))


def after(*cases: str) -> pytest.MarkDecorator:
    """Run a test once for each case, with its `folder`, after it has run on two ranks."""
    return pytest.mark.parametrize("folder", cases, indirect=True)


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout[-2000:] + done.stderr[-4000:]
