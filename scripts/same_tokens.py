"""Check on real models that responses depend on neither block size nor batch.

    python scripts/same_tokens.py --student runs/quickstart/student [--write PATH]

In float64 the answers are exactly the same, and a test of the suite checks that.  In the dtypes
below, rounding depends on the shape of a forward pass, so a token can change if two scores nearly
tie.  The rest of that row then differs, too.  The embedded teacher and its student write answers of
64 tokens at temperature 1 with top-25 acceptance.  Each setting is compared with block size 1 and
all rows in one batch, and the teacher alone with all its rows in one batch.  The last line compares
greedy writing with top-1 acceptance with the teacher's own greedy answers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import benchmark
import torch
from bench_rollouts import NEW, TEACHER, prompts

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill import InterleavedRollout, LocalTeacher, ResponseObjective, SampledRollout, Sampling
from llmdistill.models.load import load_model, load_tokenizer
from llmdistill.protocols import Progress
from llmdistill.training.step import Distillation

SIZES: tuple[Any, ...] = (2, 3, 5, 8, "auto")
BATCHES = (1, 4)
AT = Progress(step=0, epoch=0, seed=0)


def rows(dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count the rows that differ in one dtype: one table row for each comparison."""
    tokenizer = load_tokenizer(TEACHER)
    teacher = LocalTeacher(load_model(TEACHER, dtype=dtype), tokenizer)
    student = Distillation(
        load_model(options.student, dtype=dtype), teacher, [ResponseObjective()], tokenizer
    )
    some = prompts(tokenizer, options.rows)

    def answers(rollout: Any, batch: int) -> list[list[int]]:
        places = [range(i, min(i + batch, len(some))) for i in range(0, len(some), batch)]
        parts = [some.select(list(some_places), pad_id=0) for some_places in places]
        return [
            ids for part in parts for ids in rollout.write(part, student, teacher, AT).responses()
        ]

    def interleaved(size: Any, batch: int, **changes: Any) -> list[list[int]]:
        settings: dict[str, Any] = {
            "top_k": 25, "student_sampling": Sampling(), "teacher_sampling": Sampling(),
        }  # fmt: skip
        rollout = InterleavedRollout(block_size=size, max_new_tokens=NEW, **settings | changes)
        return answers(rollout, batch)

    first = interleaved(1, options.rows)  # the reference: one token per block
    found = [(f"block size {size}", interleaved(size, options.rows), first) for size in SIZES]
    found.append(("block size 5, batches of 4", interleaved(5, 4), first))

    def alone(batch: int) -> list[list[int]]:
        rollout = SampledRollout("teacher", sampling=Sampling(), max_new_tokens=NEW)
        return answers(rollout, batch)

    together = alone(options.rows)
    found += [(f"the teacher alone, batches of {n}", alone(n), together) for n in BATCHES]
    greedy = Sampling(temperature=0.0)
    # Greedy top-1 acceptance keeps a drafted token only if the teacher would write it, too.
    own = answers(SampledRollout("teacher", sampling=greedy, max_new_tokens=NEW), options.rows)
    top1 = interleaved(5, options.rows, top_k=1, student_sampling=greedy, teacher_sampling=greedy)
    found.append(("greedy, top 1, against the teacher alone", top1, own))
    return [
        {
            "dtype": dtype,
            "compared": what,
            "rows": len(some),
            "rows that differ": sum(a != b for a, b in zip(ours, theirs, strict=True)),
        }
        for what, ours, theirs in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument(
        "--student", required=True, help="folder of a student of the embedded teacher"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes of both models"
    )
    parser.add_argument("--rows", type=int, default=16, help="number of prompts")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = [row for dtype in options.dtypes for row in rows(dtype, options)]
    about = (__doc__ or "").split("\n\n")[2]
    benchmark.report(options.write, "The same tokens?", [about, benchmark.table(table)])


if __name__ == "__main__":
    main()
