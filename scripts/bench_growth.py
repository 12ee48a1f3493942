"""How cost grows: the time of a step, and the memory of a step and of its loss.

    python scripts/bench_growth.py [--write docs/results/growth.md] [--rounds 5]

N = positions, H = hidden size, V = vocabulary.  Each curve has an expected slope and a measured
one, by least squares: in logarithms for times (1 is linear), per unit for memory.  Memory is what
one call needs above its inputs, at its peak, in a process forked for each point.  Models are toys
with random weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmark
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill.batch import Sequences
from llmdistill.models.chunks import CHUNK_ROWS, HeadLogits
from llmdistill.models.footprint import Load, activation_bytes
from llmdistill.models.heads import Head
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import jsd
from llmdistill.objectives.response import ResponseObjective
from llmdistill.sampling import Writer
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.step import Distillation
from tests import toy

WIDTH, LENGTH = 128, 64  # hidden size of the loss and the student; tokens of a row


@dataclass(frozen=True)
class Curve:
    """One curve: what is measured at which points, and how steep it should be.

    To add one, write a function that measures a point and put a Curve into `curves`.
    """

    title: str
    unit: str  # of a point
    points: Sequence[int]
    measured: Callable[[Sequence[int], int], list[float]]  # (points, rounds) -> figures
    figure: str  # name and unit of what is measured
    expected: float
    slope: str  # name of the slope
    is_power: bool = False  # whether the slope is that of the logarithms


def slope(points: Sequence[float], figures: Sequence[float]) -> float:
    """Return the least-squares slope."""
    return statistics.linear_regression(points, figures).slope


# ---- what is measured ----


def student(**options: int) -> torch.nn.Module:
    return toy.model(hidden=WIDTH, layers=4, **options)


def distillation() -> Distillation:
    """Build a toy student and a toy teacher, ready for a step."""
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    return Distillation(student(), teacher, [ResponseObjective("jsd")], toy.tokenizer())


def sequences(num_tokens: int) -> Sequences:
    """Build rows of LENGTH tokens, of which the first is the prompt."""
    rows = num_tokens // LENGTH
    ids = [[5 + i % 200 for i in range(LENGTH)]] * rows
    options = {"writer": Writer.DATA, "pad_id": 0}
    return Sequences.pack([x[:1] for x in ids], [x[1:] for x in ids], range(rows), **options)


def step(trained: Distillation, batch: Sequences) -> None:
    """Run one forward and one backward pass."""
    trained.zero_grad()
    trained(batch).loss.backward()


def step_seconds(points: Sequence[int], rounds: int) -> list[float]:
    """Return the median seconds of a step, with batches of these sizes in turn."""

    def measure() -> list[float]:
        trained = distillation()
        variants = {str(n): functools.partial(step, trained, sequences(n)) for n in points}
        return list(benchmark.in_turn(variants, rounds).values())

    return in_fork(measure)


def step_mib(points: Sequence[int], rounds: int) -> list[float]:
    """Return the MiB that a step needs for batches of these sizes."""

    def measure(num_tokens: int) -> Callable[[], None]:
        trained, batch = distillation(), sequences(num_tokens)
        return lambda: step(trained, batch)

    return [peak(functools.partial(measure, n)) for n in points]


def loss_mib(points: Sequence[int], rounds: int, *, by: str) -> list[float]:
    """Return the MiB that a loss needs by its positions ("N") or by its vocabulary ("V")."""

    def measure(positions: int, vocabulary: int) -> Callable[[], None]:
        hidden_NH = torch.randn(positions, WIDTH, requires_grad=True)
        head = Head(torch.randn(vocabulary, WIDTH, requires_grad=True))
        teacher = HeadLogits(torch.randn(positions, WIDTH), Head(torch.randn(vocabulary, WIDTH)))

        def run() -> None:
            total, _ = chunked_sum(
                hidden_NH, head, lambda s, rows: jsd(s, teacher[rows]), torch.ones(positions)
            )
            total.backward()

        return run

    sizes = [(n, 16_384) if by == "N" else (2 * CHUNK_ROWS, n) for n in points]
    return [peak(functools.partial(measure, *size)) for size in sizes]


def peak(build: Callable[[], Callable[[], None]]) -> float:
    """Return the MiB that a call needs above what `build` made."""

    def measure() -> float:
        call = build()
        benchmark.reset_peak()
        before = benchmark.peak_mib()
        call()
        return benchmark.peak_mib() - before

    return in_fork(measure)


def in_fork(measure: Callable[[], Any]) -> Any:
    """Return the figures of a function that runs in a forked process.

    This process then stays as it is: memory that it had used and freed would be used again.
    """
    reads, writes = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writes, json.dumps(measure()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        found = answer.read()
    os.wait()
    if not found:
        sys.exit("bench_growth.py: a forked process ended without figures; its error is above.")
    return json.loads(found)


# ---- the curves ----


def curves() -> list[Curve]:
    """Return all curves with their expected slopes."""
    load = Load(tokens=1000, written_tokens=0, product_bytes=4.0)
    kept = "Expected is what autograd keeps; a backward pass makes more than that"
    of_v = "one chunk of the logits of both models, and the head's gradient"
    return [
        Curve(
            "Step time against tokens: linear", "tokens", (512, 1024, 2048, 4096, 8192),
            step_seconds, "seconds", 1.0, "slope of the logarithms", is_power=True,
        ),
        Curve(
            f"Step memory against tokens: linear. {kept}", "tokens",
            (2048, 4096, 8192, 16_384), step_mib, "MiB",
            activation_bytes(student(), load) / 2**20, "MiB per 1,000 tokens",
        ),
        Curve(
            "Loss memory against positions: constant except for the gradient of hidden states",
            "positions", (512, 2048, 8192, 32_768), functools.partial(loss_mib, by="N"), "MiB",
            1000 * 4 * WIDTH / 2**20, "MiB per 1,000 positions",
        ),
        Curve(
            f"Loss memory against the vocabulary: linear, {of_v}", "ids",
            (8192, 16_384, 32_768, 65_536), functools.partial(loss_mib, by="V"), "MiB",
            1000 * 4 * (2 * CHUNK_ROWS + WIDTH) / 2**20, "MiB per 1,000 ids",
        ),
    ]  # fmt: skip


def page(curve: Curve, rounds: int) -> list[str]:
    """Measure a curve and return its parts of the page."""
    figures = curve.measured(curve.points, rounds)
    if curve.is_power:
        found = slope([math.log(x) for x in curve.points], [math.log(y) for y in figures])
    else:
        found = slope([x / 1000 for x in curve.points], figures)
    rows = [
        {curve.unit: x, curve.figure: f"{y:.3g}" if curve.is_power else f"{y:.1f}"}
        for x, y in zip(curve.points, figures, strict=True)
    ]
    said = f"The {curve.slope} is {found:.2f}; expected {curve.expected:.2f}."
    return [f"## {curve.title}", benchmark.table(rows), said]


def cpu() -> str:
    """Return the CPU's name and the instruction sets that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    flags = next(line for line in lines if line.startswith("flags")).split()
    known = [one for one in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if one in flags]
    return f"The CPU is an {name} with {', '.join(known)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process cannot use the threads of the first one
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    parts = [about, f"{cpu()} One thread."]
    for curve in curves():
        parts += page(curve, options.rounds)
    benchmark.report(options.write, "How cost grows", parts)


if __name__ == "__main__":
    main()
