"""Compare the speed of two checkouts of this repository, before and after a change.

    git worktree add ../before COMMIT
    python scripts/compare_trees.py ../before . [--write docs/results/seams.md] [--rounds 3]

The figures are those of llmdistill itself in `scripts/bench_step.py` and `scripts/bench_loss.py`.
Each checkout runs its own copy of these scripts.  The checkouts take turns, and each call starts a
new process.  Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import benchmark
import torch

STEPS = 4
LOSS = """
import json, sys, time
sys.path.insert(0, "scripts")
import torch, bench_loss
torch.set_num_threads(1)
data = bench_loss.Inputs(bench_loss.CPU_SHAPES[0], torch.float32)
seconds = []
for _ in range(6):
    start = time.perf_counter()
    bench_loss.ours(data, sys.argv[1])
    data.forget()
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": seconds[1:], "peak": None}))
"""
STEP = "scripts/bench_step.py"
FIGURES = {
    "step, dataset answers": [STEP, "--one", json.dumps(["ours", "data set answers", STEPS])],
    "step, on-policy": [STEP, "--one", json.dumps(["ours", "on-policy", STEPS])],
    "loss, jsd": ["-c", LOSS, "jsd"],
    "loss, forward_kl": ["-c", LOSS, "forward_kl"],
}


def measured(tree: Path, command: list[str]) -> dict:
    """Run a command in a checkout; return its seconds and its peak in MiB (None for a loss)."""
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="checkout without the change")
    parser.add_argument("after", type=Path, help="checkout with the change")
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--rounds", type=int, default=3, help="number of measured rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the report states this number, and the measured scripts use one
    table = []
    for name, command in FIGURES.items():
        runs: dict[str, list[dict]] = {"before": [], "after": []}
        for _ in range(options.rounds):
            for side, some in runs.items():
                some.append(measured(getattr(options, side), command))
        seconds = {
            side: statistics.median(s for run in some for s in run["seconds"])
            for side, some in runs.items()
        }
        row = {"figure": name, "before": seconds["before"], "after": seconds["after"]}
        row["after / before"] = seconds["after"] / seconds["before"]
        peaks = {side: [r["peak"] for r in some if r["peak"]] for side, some in runs.items()}
        memory = max(peaks["after"]) / max(peaks["before"]) if peaks["after"] else ""
        table.append(row | {"memory, after / before": memory})
    about = "Seconds of our step and loss in two checkouts, in turn, with one thread in float32."
    benchmark.report(options.write, "Before and after", [about, benchmark.table(table)])


if __name__ == "__main__":
    main()
