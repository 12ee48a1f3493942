"""Measures one GPU in at most 8 minutes, in comparison with TRL and `generate`.

The parts are the loss, a training step, and writing.

    python scripts/bench_gpu.py [--out gpu.md] [--parts loss step writing] [--minutes 8]
    python scripts/bench_gpu.py --tiny

N = positions, H = hidden size, V = vocabulary.  The shapes are those of a SmolLM2-1.7B teacher and
a SmolLM2-360M student, with random weights made from configurations, so nothing is downloaded.
Products are in bfloat16; the trained student has float32 weights under autocast.  TRL's trainers
are measured too if TRL is installed.

Utilisation (MFU) counts the products with weights alone, twice their number for each token and pass
and twice that again for gradients, and divides by the device's peak for bfloat16: the maker's if it
is known, otherwise that of one large product here.  `--tiny` takes toy shapes and runs on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmark
import datasets
import torch
from bench_step import tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill import DistillTrainer, FixedRollout, LocalTeacher, ResponseObjective, SampledRollout
from llmdistill.batch import Prompts
from llmdistill.decoding.sample import sample
from llmdistill.models.chunks import HeadLogits
from llmdistill.models.heads import Head
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import DIVERGENCES
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.training.progress import StepClock

VOCABULARY = 49_152  # SmolLM2's, and the number of ids of the tokenizer
# FLOP/s in bfloat16 without sparsity, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
PARTS = ("loss", "step", "writing")


@dataclass(frozen=True)
class Size:
    """Shapes and amounts of one run of this script."""

    device: str
    dtype: torch.dtype
    teacher: tuple[int, ...]  # layers, hidden size, MLP neurons, heads, heads of keys and values
    student: tuple[int, ...]
    positions: int  # of the loss
    batch: int  # rows of a step
    rows: int  # rows that are written at once
    prompt: int  # tokens
    new: int  # tokens
    steps: int  # of a trainer; the first one does not count
    compiles: bool  # whether decoding is also compiled


GPU = Size(
    "cuda", torch.bfloat16, (24, 2048, 8192, 32, 32), (32, 960, 2560, 15, 5),
    positions=8192, batch=16, rows=64, prompt=256, new=256, steps=4, compiles=True,
)  # fmt: skip
TINY = Size(
    "cpu", torch.float32, (2, 48, 96, 4, 2), (2, 32, 64, 4, 2),
    positions=32, batch=2, rows=2, prompt=24, new=8, steps=2, compiles=False,
)  # fmt: skip


class Bench:
    """The measurements of one run: what is built from a Size, and what has been found."""

    def __init__(self, size: Size, minutes: float) -> None:
        self.size, self.end = size, time.perf_counter() + 60 * minutes
        self.tokenizer = tokenizer()
        self.peak, self.peak_source = peak_flops(size)

    def model(self, name: str, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
        """Build "teacher" or "student" with random weights on the device."""
        shape = getattr(self.size, name)
        torch.manual_seed(shape[0])
        with torch.device(self.size.device):
            config = benchmark.llama_config(shape, VOCABULARY)
            made = LlamaForCausalLM(config).to(dtype or self.size.dtype).eval()
        made.generation_config.eos_token_id, made.generation_config.pad_token_id = 2, 0
        return made

    def weights(self, name: str) -> int:
        """Return the number of weights that a token is multiplied with; the head is tied."""
        layers, hidden, neurons, heads, shared = getattr(self.size, name)
        attention = 2 * hidden * hidden + 2 * hidden * hidden * shared // heads
        return layers * (attention + 3 * hidden * neurons) + VOCABULARY * hidden

    def mfu(self, flops: float, seconds: float) -> str:
        return f"{100 * flops / seconds / self.peak:.1f}%"

    def row(self, name: str, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
        """Measure one table row and show it; an error or a lack of time becomes its text."""
        found = self._row(name, measure)
        print(*(f"{key} {value}" for key, value in found.items()), sep=", ", file=sys.stderr)
        return found

    def _row(self, name: str, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
        if time.perf_counter() > self.end:
            return {"what": name, "note": "not run: the time is over"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return {"what": name} | measure() | {"note": ""}
        except Exception as error:  # a peer that fails must not cost the other rows
            text = str(error).strip().splitlines()
            return {"what": name, "note": f"{type(error).__name__}: {text[0][:90] if text else ''}"}


def peak_flops(size: Size) -> tuple[float, str]:
    """Return the device's FLOP/s in the dtype of products, and where the figure comes from."""
    if size.device == "cuda":
        name = torch.cuda.get_device_name()
        known = [(part, peak) for part, peak in PEAKS.items() if part in name]
        if known:
            return known[0][1], f"the maker's {known[0][1] / 1e12:.0f} TFLOP/s"
    width = 8192 if size.device == "cuda" else 512
    square = torch.randn(width, width, device=size.device, dtype=size.dtype)
    seconds = benchmark.in_turn({"product": lambda: square @ square}, rounds=3)["product"]
    peak = 2 * width**3 / seconds
    return peak, f"{peak / 1e12:.2f} TFLOP/s, measured in a product of {width} x {width} matrices"


# ---- the loss ----


def loss_rows(bench: Bench) -> Iterator[dict[str, object]]:
    """Yield a row for each divergence: from hidden states to the gradients of states and head."""
    size, (width, teacher_width) = bench.size, (bench.size.student[1], bench.size.teacher[1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=size.device, dtype=size.dtype)

    student_NH, teacher_NH = normal(size.positions, width), normal(size.positions, teacher_width)
    student_VH = normal(VOCABULARY, width).mul_(1.5 / width**0.5).requires_grad_()
    teacher_VH = normal(VOCABULARY, teacher_width).mul_(1.5 / teacher_width**0.5)
    weight_N = torch.ones(size.positions, device=size.device)
    flops = 2.0 * size.positions * VOCABULARY * (3 * width + teacher_width)
    student_NH.requires_grad_()

    def once(name: str) -> None:
        student_NH.grad = student_VH.grad = None
        teacher, divergence = HeadLogits(teacher_NH, Head(teacher_VH)), DIVERGENCES[name]
        total, _ = chunked_sum(
            student_NH, Head(student_VH), lambda s, rows: divergence(s, teacher[rows]), weight_N
        )
        (total / size.positions).backward()

    def measure(name: str) -> dict[str, object]:
        student_NH.grad = student_VH.grad = None
        before = reset()
        seconds = benchmark.in_turn({name: lambda: once(name)}, rounds=3)[name]
        found = {"ms": 1000 * seconds, "tokens/s": round(size.positions / seconds)}
        return found | {
            "MiB": round(benchmark.peak_mib() - before),
            "MFU": bench.mfu(flops, seconds),
        }

    for name in DIVERGENCES:
        yield bench.row(name, lambda name=name: measure(name))


def reset() -> float:
    """Start to measure a peak; return the MiB that are in use already."""
    benchmark.reset_peak()
    return benchmark.peak_mib()


# ---- a training step ----

ROLLOUTS: dict[str, Callable[[int], Any]] = {
    "fixed": lambda new: FixedRollout(),
    "on-policy": lambda new: SampledRollout("student", max_new_tokens=new),
    # Random models agree on nothing, so a share of the positions is accepted instead.
    "interleaved": lambda new: InterleavedRollout(
        accept="mixture", block_size=4, max_new_tokens=new
    ),
}
PEERS = [("TRL GKD", "fixed"), ("TRL GKD", "on-policy"), ("TRL DistillationTrainer", "on-policy")]


def step_rows(bench: Bench) -> Iterator[dict[str, object]]:
    """Yield a row for each way of writing, and for TRL's trainers if TRL is installed."""
    runs = [("ours", kind) for kind in ROLLOUTS]
    if importlib.util.find_spec("trl") is not None and bench.size is not TINY:
        runs += PEERS
    for who, kind in runs:
        yield bench.row(f"{kind}, {who}", lambda who=who, kind=kind: one_step(bench, who, kind))


def one_step(bench: Bench, who: str, kind: str) -> dict[str, object]:
    """Train a few steps and return the figures of the median one."""
    size = bench.size
    with tempfile.TemporaryDirectory() as folder:
        clock, made = StepClock(), trainer(bench, who, kind, folder)
        made.add_callback(clock)
        benchmark.reset_peak()
        made.train()
    counted = sorted(clock.seconds[1:])
    seconds = counted[len(counted) // 2]
    tokens = size.batch * (size.prompt + size.new)
    passes = 6 * bench.weights("student") + 2 * bench.weights("teacher")
    passes += 2 * bench.weights("student") * (kind != "fixed")  # reading while it writes
    found = {"s/step": seconds, "tokens/s": round(tokens / seconds)}
    peak = {"MiB": round(benchmark.peak_mib())}
    return found | peak | {"MFU": bench.mfu(float(passes) * tokens, seconds)}


def chats(bench: Bench) -> list[list[dict[str, str]]]:
    """Build conversations with as many tokens of prompt and answer as the size says."""
    size, draw = bench.size, random.Random(0)
    empty = [{"role": "user", "content": ""}]
    around = len(
        bench.tokenizer.apply_chat_template(empty, add_generation_prompt=True)["input_ids"]
    )
    lengths = {"user": max(size.prompt - around, 1), "assistant": size.new - 1}
    return [
        [
            {"role": role, "content": "".join(draw.choices("abcdefgh", k=length))}
            for role, length in lengths.items()
        ]
        for _ in range(size.batch * size.steps)
    ]


def trainer(bench: Bench, who: str, kind: str, folder: str) -> Any:
    """Build one of the trainers, all with the same models, rows and optimizer."""
    size, on_gpu = bench.size, bench.size.device == "cuda"
    common: dict[str, Any] = {
        "output_dir": folder, "use_cpu": not on_gpu, "bf16": on_gpu, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "learning_rate": 1e-5, "per_device_train_batch_size": size.batch, "max_steps": size.steps,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    student, teacher = bench.model("student", torch.float32), bench.model("teacher")
    rows = chats(bench)
    if who == "ours":
        return DistillTrainer(
            student=student, teacher=LocalTeacher(teacher, bench.tokenizer),
            rollout=ROLLOUTS[kind](size.new), objectives=[ResponseObjective("jsd", beta=0.5)],
            args=TrainingArguments(**common), train_dataset=[{"messages": row} for row in rows],
            processing_class=bench.tokenizer,
        )  # fmt: skip
    parts = {"model": student, "teacher_model": teacher, "processing_class": bench.tokenizer}
    common |= {"gradient_checkpointing": False, "beta": 0.5}  # TRL's default would cost time
    if who == "TRL GKD":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        options = {"lmbda": float(kind == "on-policy"), "max_length": size.prompt + size.new}
        config = GKDConfig(**common, **options, max_new_tokens=size.new)
        data = datasets.Dataset.from_list([{"messages": row} for row in rows])
        return GKDTrainer(args=config, train_dataset=data, **parts)
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(**common, max_completion_length=size.new)
    data = datasets.Dataset.from_list([{"prompt": row[:1]} for row in rows])
    return DistillationTrainer(args=config, train_dataset=data, **parts)


# ---- writing ----


def writing_rows(bench: Bench) -> Iterator[dict[str, object]]:
    """Yield a row for each model and each way of writing."""
    for name in ("student", "teacher"):
        for way in WRITERS:
            if way != "static cache, compiled" or bench.size.compiles:
                yield bench.row(
                    f"{name}, {way}", lambda name=name, way=way: written(bench, name, way)
                )


def written(bench: Bench, name: str, way: str) -> dict[str, object]:
    """Write a batch twice and return the figures of the second time."""
    size, model = bench.size, bench.model(name)
    draw = random.Random(1)
    ids = [[draw.randrange(3, 250) for _ in range(size.prompt)] for _ in range(size.rows)]
    prompts = Prompts.pack(ids, range(size.rows), pad_id=0)
    for _ in range(2):  # the first time compiles and allocates
        before = reset()
        start = time.perf_counter()
        tokens = WRITERS[way](bench, model, prompts)
        if size.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    found = {"seconds": seconds, "tokens": tokens, "tokens/s": round(tokens / seconds)}
    peak = {"MiB above weights": round(benchmark.peak_mib() - before)}
    return found | peak | {"MFU": bench.mfu(2.0 * bench.weights(name) * tokens, seconds)}


def stock(bench: Bench, model: LlamaForCausalLM, prompts: Prompts, **options: Any) -> int:
    """Write with transformers' `generate`; return the number of new tokens."""
    ids_BP = prompts.input_ids_BP.to(model.device)
    # No end token, so that all rows have the same length.
    model.generation_config.eos_token_id = None
    out_BT = model.generate(
        input_ids=ids_BP, attention_mask=prompts.attention_mask_BP.to(model.device), do_sample=True,
        top_k=0, max_new_tokens=bench.size.new, min_new_tokens=bench.size.new, **options,
    )  # fmt: skip
    return out_BT.shape[0] * (out_BT.shape[1] - ids_BP.shape[1])


def ours(bench: Bench, model: LlamaForCausalLM, prompts: Prompts, *, continuous: bool) -> int:
    """Write with `sample`; return the number of new tokens."""
    out = sample(
        model, bench.tokenizer, prompts, Sampling(continuous=continuous),
        max_new_tokens=bench.size.new, draw=Draw(0), writer=Writer.STUDENT, stops=False,
    )  # fmt: skip
    return int(out.num_predicted.sum())


WRITERS: dict[str, Callable[..., int]] = {
    "generate": stock,
    "ours, sample": lambda *parts: ours(*parts, continuous=False),
    "ours, continuous (generate_batch)": lambda *parts: ours(*parts, continuous=True),
    "static cache, compiled": lambda *parts: stock(*parts, cache_implementation="static"),
}


# ---- the page ----

ROWS = {"loss": loss_rows, "step": step_rows, "writing": writing_rows}


def about(part: str, bench: Bench) -> str:
    """Return the sentence above a table."""
    size = bench.size
    return {
        "loss": f"The loss: N = {size.positions}, V = {VOCABULARY}, H = {size.student[1]} and "
        f"{size.teacher[1]}, hidden states and heads in {size.dtype}; MiB above the inputs.",
        "step": f"A step with JSD: {size.batch} rows of {size.prompt} + {size.new} tokens, AdamW, "
        "blocks of 4. tokens/s are of prompts and responses.",
        "writing": f"Writing: {size.rows} rows of {size.prompt} + {size.new} tokens, models in "
        f"{size.dtype}, temperature 1. tokens/s are of responses.",
    }[part]


def table(rows: list[dict[str, object]]) -> str:
    """Format rows, of which some have only a note, as a Markdown table."""
    columns = [*dict.fromkeys(key for row in rows for key in row if key != "note"), "note"]
    return benchmark.table([{key: row.get(key, "") for key in columns} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="also write the page to this Markdown file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--minutes", type=float, default=8, help="start no row after this time")
    parser.add_argument("--tiny", action="store_true", help="use toy shapes, on a CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.exit(2, "bench_gpu.py: no GPU was found. Run it on one, or use --tiny.\n")
    bench = Bench(TINY if options.tiny else GPU, options.minutes)
    title = "A toy run, whose figures mean nothing" if options.tiny else "On one GPU"
    parts = [f"The peak for utilisation is {bench.peak_source}."]
    for part in options.parts:
        parts += [about(part, bench), table(list(ROWS[part](bench)))]
        # Written after each part, so that a run that is cut off leaves what it has found.
        is_last = part == options.parts[-1]
        benchmark.report(options.out, title, parts, prints=is_last)


if __name__ == "__main__":
    main()
