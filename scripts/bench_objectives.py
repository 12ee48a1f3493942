"""Time and memory of a step with each objective, against forward KL alone.

    python scripts/bench_objectives.py [--write docs/results/objectives_cost.md] [--rounds 3]

The pair is the embedded teacher and a copy with 20 of its 30 layers; a batch has 8 rows of 256
tokens, of which 192 are predicted.  A step is the teacher's forward pass and the student's forward
and backward pass, without an optimizer.  Each objective is measured without others, in a separate
process, so hidden states and relations compute no logits.  Times are medians; memory is the peak of
the process above what the loaded pair takes.  Forward KL runs first and last: the difference is the
noise.  Passes are forward passes.  Objectives on changed inputs are measured with the pass on the
unchanged inputs, which they share with others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmark
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill import LocalTeacher
from llmdistill import recipe as recipes
from llmdistill.batch import Sequences
from llmdistill.models.carve import evenly_spaced, keep_layers
from llmdistill.models.load import native_bfloat16
from llmdistill.objectives.build import build_objectives
from llmdistill.sampling import Writer
from llmdistill.teachers.pruned import PrunedTeacher
from llmdistill.training.step import Distillation

NAME, LAYERS = "smollm2-135m-instruct", 20
ROWS, PROMPT, RESPONSE = 8, 64, 192
KL: dict[str, Any] = {"kind": "response"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward_kl": KL,
    "hidden, last layer": {"kind": "hidden", "distance": "cosine"},
    "hidden, all layers": {"kind": "hidden", "distance": "cosine", "layers": "uniform"},
    "cka, all layers": {"kind": "cka", "layers": "uniform"},
    "rtk": {"kind": "rtk"},
    "embed_distill": {"kind": "embed_distill"},
    "minilm": {"kind": "minilm"},
    "rkd": {"kind": "rkd"},
    "similarity": {"kind": "similarity"},
    "pkt": {"kind": "pkt"},
    "flow": {"kind": "flow"},
    "icd": {"kind": "icd"},
    "crd": {"kind": "crd", "queue_size": 512},
    "rrd": {"kind": "rrd", "queue_size": 512},
    "mixkd": {"kind": "mixkd"},
    "adversarial, 1 step": {"kind": "adversarial"},
    "adversarial, 3 steps": {"kind": "adversarial", "steps": 3},
    "token_dropout": {"kind": "token_dropout"},
    "ckd": {"kind": "ckd"},
    "dist": {"kind": "dist"},
    "correlation": {"kind": "correlation"},
    "correlation, pruned teacher": {"kind": "correlation"},
    "its token_dropout, pruned teacher": {"kind": "token_dropout", "of": "correlation"},
    "forward_kl again": KL,
}


def sequences(length: int) -> Sequences:
    """Return random rows with prompts and responses in the proportion of the benchmark."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (ROWS, length), generator=draw).tolist()
    start = length * PROMPT // (PROMPT + RESPONSE)
    prompts, responses = [row[:start] for row in ids], [row[start:] for row in ids]
    rows = list(range(ROWS))
    return Sequences.pack(prompts, responses, rows, writer=Writer.DATA, pad_id=0)


def measure(name: str, rounds: int) -> dict[str, float]:
    """Return the seconds of a step, its peak in MiB, and its passes.  Call it in a new process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = LocalTeacher.load(NAME, dtype="auto")
    if "pruned" in name:
        teacher = PrunedTeacher.of(teacher, share=0.1, pruned_weight=0.3)
    student = keep_layers(teacher.model, evenly_spaced(30, LAYERS)).float().requires_grad_().train()
    given = {"output": "-", "teacher": {"model": NAME}, "student": {"model": NAME}}
    recipe = recipes.build(given | {"data": {"train": "-.jsonl"}, "objectives": [OBJECTIVES[name]]})
    torch.manual_seed(0)
    objectives = build_objectives(recipe.objectives)
    step = Distillation(student, teacher, objectives, teacher.tokenizer).to(device)

    def run(batch: Sequences) -> None:
        step.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bfloat16(device)):
            loss = step(batch).loss
        loss.backward()

    passes = {"student": 0, "teacher": 0}
    for side, model in (("student", student), ("teacher", teacher.model)):

        def count(*_: Any, side: str = side) -> None:
            passes[side] += 1

        model.base_model.register_forward_hook(count)
    run(sequences(16).to(device))  # loads libraries
    counted = dict(passes)
    batch = sequences(PROMPT + RESPONSE).to(device)
    step.zero_grad(set_to_none=True)
    benchmark.reset_peak()
    before = benchmark.peak_mib()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    used = {"seconds": statistics.median(seconds), "MiB": benchmark.peak_mib() - before}
    return used | counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--rounds", type=int, default=3, help="number of measured steps")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        return print(json.dumps(measure(options.one, options.rounds)))
    shared = ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    found = {}
    for name in OBJECTIVES:
        command = [sys.executable, __file__, "--one", name, *shared]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], file=sys.stderr, flush=True)
    kl = found["forward_kl"]
    rows = [
        {
            "objective": name,
            "passes of student, teacher": f"{one['student']}, {one['teacher']}",
            "time / forward KL": one["seconds"] / kl["seconds"],
            "memory / forward KL": one["MiB"] / kl["MiB"],
            "seconds": one["seconds"],
            "MiB above the pair": round(one["MiB"]),
        }
        for name, one in found.items()
    ]
    parts = [
        f"One step of {ROWS} rows of {PROMPT + RESPONSE} tokens, {RESPONSE} of them predicted: the "
        f"embedded teacher and a copy with {LAYERS} of its 30 layers. Each objective is alone.",
        benchmark.table(rows),
    ]
    benchmark.report(options.write, "The cost of each objective", parts)


if __name__ == "__main__":
    main()
