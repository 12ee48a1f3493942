"""Time and memory of the loss from hidden states to gradients: ours, TRL's and Liger's.

    python scripts/bench_loss.py [--write docs/results/loss.md] [--dtype bfloat16] [--rounds 5]
    python scripts/bench_loss.py --profile jsd

N = positions, H = hidden size, V = vocabulary.  The loss is JSD with beta 0.5, with gradients for
hidden states and head.  The floor is the four matrix products that every implementation needs.
Implementations are called in turn, and times are medians.  Memory is what one call in a separate
process needs above its inputs.  On a GPU the shapes are those of a student of 360M and a teacher of
1.7B parameters.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import benchmark
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill.models.chunks import HeadLogits
from llmdistill.models.heads import Head
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import DIVERGENCES

CPU_SHAPES = [(512, 576, 576, 49_152), (512, 384, 384, 151_936), (2048, 576, 576, 49_152)]
GPU_SHAPES = [(8192, 960, 2048, 49_152), (8192, 1024, 2560, 151_936)]
CHUNK = 256  # positions that ours and the floor process at a time
CUDA = torch.cuda.is_available()


class Inputs:
    """Random hidden states and heads of two models whose JSD is about 0.2 nats."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        positions, width, teacher_width, vocabulary = shape
        device = "cuda" if CUDA else "cpu"
        draw = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=draw, device=device) * scale).to(dtype)

        self.student_NH = normal(positions, width).requires_grad_()
        self.teacher_NH = normal(positions, teacher_width)
        self.student_VH = normal(vocabulary, width, scale=1.5 / width**0.5).requires_grad_()
        self.teacher_VH = normal(vocabulary, teacher_width, scale=1.5 / teacher_width**0.5)

    def forget(self) -> None:
        """Drop the gradients, so that a call does not add to those of the call before."""
        self.student_NH.grad = self.student_VH.grad = None


def products(data: Inputs) -> None:
    """Compute both projections and both gradients in chunks, without a loss.

    This is the floor for the time.  Buffers are reused, so memory is close to its floor, too.
    """
    hidden, head = data.student_NH.detach(), data.student_VH.detach()
    logits_cV = head.new_empty(CHUNK, len(head))
    grad_NH, grad_VH = torch.empty_like(hidden), torch.zeros_like(head)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        torch.mm(data.teacher_NH[rows], data.teacher_VH.t(), out=logits_cV)
        torch.mm(hidden[rows], head.t(), out=logits_cV)
        torch.mm(logits_cV, head, out=grad_NH[rows])
        grad_VH.addmm_(logits_cV.t(), hidden[rows])


def ours(data: Inputs, divergence: str = "jsd") -> float:
    """Return the mean loss in nats, after its backward pass; so do the three functions below."""
    data.forget()
    teacher = HeadLogits(data.teacher_NH, Head(data.teacher_VH), CHUNK)
    function = DIVERGENCES[divergence]
    total, _ = chunked_sum(
        data.student_NH,
        Head(data.student_VH),
        lambda student_nV, rows: function(student_nV, teacher[rows]),
        torch.ones(len(data.student_NH), device=data.student_NH.device),
        chunk_size=CHUNK,
    )
    loss = total / len(data.student_NH)
    loss.backward()
    return loss.item()


def trl_gkd(data: Inputs) -> float:
    from trl.experimental.gkd import GKDTrainer

    data.forget()
    student_NV, teacher_NV = (
        data.student_NH @ data.student_VH.t(),
        data.teacher_NH @ data.teacher_VH.t(),
    )
    loss = GKDTrainer.generalized_jsd_loss(student_NV[None], teacher_NV[None], beta=0.5)
    loss.backward()
    return loss.item() / len(student_NV)  # TRL divides by the batch size, which is 1 here


def trl_chunked(data: Inputs) -> float:
    # TRL has no public name for this function (1.16.0).
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    data.forget()
    loss, _, _ = _chunked_divergence_loss(
        data.student_NH[None],
        data.teacher_NH[None],
        data.student_VH,
        data.teacher_VH,
        torch.ones(1, len(data.student_NH), device=data.student_NH.device),
        beta=0.5,
    )
    loss.backward()
    return loss.item()


def liger(data: Inputs) -> float:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    data.forget()
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=CUDA, chunk_size=128
    )(
        data.student_NH,
        data.student_VH,
        data.teacher_NH,
        data.teacher_VH,
        torch.zeros(len(data.student_NH), dtype=torch.long, device=data.student_NH.device),
    )
    loss.backward()
    return loss.item()


PEERS: dict[str, Callable[[Inputs], object]] = {
    "four products": products,
    "ours": ours,
    "TRL GKD": trl_gkd,
    "TRL chunked": trl_chunked,
}
if importlib.util.find_spec("liger_kernel") is not None:
    PEERS["Liger"] = liger


def jsd_rows(shapes: list[tuple[int, ...]], dtype: str, rounds: int) -> list[dict[str, object]]:
    """Measure every implementation at every shape: one table row for each."""
    rows = []
    for shape in shapes:
        data = Inputs(shape, getattr(torch, dtype))
        exact = reference(data)
        losses: dict[str, float] = {}

        def call(name: str, data: Inputs = data, losses: dict[str, float] = losses) -> None:
            losses[name] = PEERS[name](data)

        calls = {name: functools.partial(call, name) for name in PEERS}
        seconds = benchmark.in_turn(calls, rounds)
        # `peak` starts a process with inputs of the same size, so free these first.
        del data, calls, call
        for name in PEERS:
            row: dict[str, object] = {"N, H student, H teacher, V": ", ".join(map(str, shape))}
            row |= {"implementation": name, "seconds": seconds[name]}
            row["time / four products"] = seconds[name] / seconds["four products"]
            row["time / TRL chunked"] = seconds[name] / seconds["TRL chunked"]
            row["MiB above inputs"] = round(peak(name, shape, dtype))
            wrong = abs(losses[name] - exact) / exact if losses[name] is not None else None
            row["error of the loss"] = f"{wrong:.0e}" if wrong is not None else "-"
            rows.append(row)
    return rows


@torch.no_grad()
def reference(data: Inputs) -> float:
    """Compute the loss in float64 from logits that are multiplied in the inputs' dtype."""
    total = 0.0
    for start in range(0, len(data.student_NH), 32):  # float64 logits of all rows are too large
        rows = slice(start, start + 32)
        student_nV = (data.student_NH[rows] @ data.student_VH.t()).double()
        teacher_nV = (data.teacher_NH[rows] @ data.teacher_VH.t()).double()
        total += DIVERGENCES["jsd"](student_nV, teacher_nV).sum().item()
    return total / len(data.student_NH)


def divergence_rows(shape: tuple[int, ...], dtype: str, rounds: int) -> list[dict[str, object]]:
    """Measure our divergences at one shape: one table row for each."""
    data = Inputs(shape, getattr(torch, dtype))
    variants: dict[str, Callable[[], object]] = {"four products": lambda: products(data)}
    for name in DIVERGENCES:
        variants[name] = lambda name=name: ours(data, name)
    seconds = benchmark.in_turn(variants, rounds)
    floor = seconds["four products"]
    return [
        {"divergence": name, "seconds": some, "time / four products": some / floor}
        for name, some in seconds.items()
    ]


def profile_rows(divergence: str, shape: tuple[int, ...], dtype: str) -> list[dict[str, object]]:
    """Profile one divergence: the share of the time that each operation takes."""
    data = Inputs(shape, getattr(torch, dtype))
    ours(data, divergence)  # the first call also allocates memory
    with torch.profiler.profile() as seen:
        ours(data, divergence)
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"operation": e.key, "calls": e.count, "share": e.self_cpu_time_total / total}
        for e in events[:12]
    ]


def peak(name: str, shape: tuple[int, ...], dtype: str) -> float:
    """Measure the MiB that one call needs above its inputs, in a separate process."""
    # In this process earlier calls have left memory that the allocator would reuse.
    command = [sys.executable, __file__, "--one", json.dumps([name, shape, dtype])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def one(name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Print the MiB that one call needs above its inputs; `peak` runs this in a new process."""
    data = Inputs(tuple(shape), getattr(torch, dtype))
    small = Inputs((8, 16, 16, 64), getattr(torch, dtype))
    # The first call loads libraries, which should not count.
    PEERS[name](small) if name != "four products" else None
    benchmark.reset_peak()
    before = benchmark.peak_mib()
    PEERS[name](data)
    print(benchmark.peak_mib() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument(
        "--dtype",
        default="bfloat16" if CUDA else "float32",
        help="dtype of hidden states and heads",
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    parser.add_argument("--profile", metavar="DIVERGENCE", help="only profile this divergence")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        return one(*json.loads(options.one))
    shapes = GPU_SHAPES if CUDA else CPU_SHAPES
    if options.profile:
        rows = profile_rows(options.profile, shapes[0], options.dtype)
        about = f"{options.profile} at {', '.join(map(str, shapes[0]))}:"
        parts = [about, benchmark.table(rows)]
        return benchmark.report(options.write, "Where the time of a loss goes", parts)
    parts = [
        f"JSD with beta 0.5 in {options.dtype}. The error is the relative difference of the loss "
        "from float64 on the same logits.",
        benchmark.table(jsd_rows(shapes, options.dtype, options.rounds)),
        f"Our divergences at {', '.join(map(str, shapes[0]))}:",
        benchmark.table(divergence_rows(shapes[0], options.dtype, options.rounds)),
    ]
    benchmark.report(options.write, "The loss, from hidden states to gradients", parts)


if __name__ == "__main__":
    main()
