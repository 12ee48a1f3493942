"""Twenty steps of GKD by TRL and by llmdistill: the same losses on one rank, and ours on two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_gkd.py"


def curves(*launcher: str) -> dict:
    command = [sys.executable, *launcher, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    return next(json.loads(line) for line in lines if line.startswith('{"ranks"'))


@pytest.mark.slow
def test_the_same_curve_as_trl_on_one_rank_and_our_own_on_two():
    pytest.importorskip("trl", reason="the oracle: pip install llmdistill[bench]")
    one = curves()
    two = curves("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731")
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert len(one["llmdistill"]) == 20
    assert one["llmdistill"] == pytest.approx(one["TRL GKD"], abs=1e-4)
    assert two["llmdistill"] == pytest.approx(one["llmdistill"], abs=1e-6)
    assert one["llmdistill"][0] - one["llmdistill"][-1] > 0.03  # the student learned something
