"""Time and memory of a step with each kind of teacher, against a frozen one on the dataset's rows.

    python scripts/bench_teachers.py [--write docs/results/teachers_step.md] [--rounds 3]

The pair is the embedded teacher and a copy with 20 of its 30 layers; a batch has 8 of the package's
seed tasks.  Their responses are trained on, or in the on-policy step 128 new tokens of the student.
With --equal the rows are random, with a prompt and a response of 128 tokens each.  A step is that
of the trainer: rollout, both models, the objectives, the backward pass and AdamW.  Each kind is
measured in a separate process, the frozen teacher first and last: the difference is the noise.
Times are medians of --rounds steps after one that is not counted; memory is the peak of the process
above what it takes before the models are loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill import recipe as recipes
from llmdistill.cost import memory
from llmdistill.data.build import load_student_tokenizer
from llmdistill.data.collate import PromptDataset
from llmdistill.data.sources import read
from llmdistill.data.table import Row
from llmdistill.data.validate import Rules
from llmdistill.run import build_trainer, load_pair, training_arguments
from llmdistill.training.progress import StepClock

NAME, LAYERS = "smollm2-135m-instruct", 20
ROWS, PROMPT, RESPONSE = 8, 128, 128
LOCAL: dict[str, Any] = {"model": NAME}
STUDENT: dict[str, Any] = {"model": NAME, "carve": {"layers": LAYERS, "by": "even"}}
LABELS: list[dict[str, Any]] = [{"kind": "cross_entropy"}]
BOTH: list[dict[str, Any]] = [{"kind": "response"}, *LABELS]
CONTEXT = "{prompt} {hint}"
KINDS: dict[str, dict[str, Any]] = {
    "supervised": {"teacher": LOCAL},
    "online (OKD)": {"teacher": LOCAL | {"kind": "online"}},
    "online, learns every 4th step": {"teacher": LOCAL | {"kind": "online", "teacher_every": 4}},
    "online, drift in the loss": {"teacher": LOCAL | {"kind": "online", "drift_weight": 0.1}},
    "ensemble of two": {"teacher": {"kind": "ensemble", "teachers": [LOCAL, LOCAL]}},
    "mutual learning of two": {
        "teacher": {"kind": "mutual", "peers": [STUDENT]},
        "objectives": BOTH,
    },
    "reflexive, base weights, context": {"teacher": {"kind": "reflexive", "context": CONTEXT}},
    "exits (BYOT), no teacher": {
        "teacher": {"kind": "reflexive", "weights": "live"},
        "objectives": [*LABELS, {"kind": "exits", "weight": 0.3}],
    },
    "fine-tuning, no teacher": {
        "teacher": {"kind": "reflexive", "weights": "live"},
        "objectives": LABELS,
    },
    "on-policy": {
        "teacher": LOCAL,
        "rollout": {"kind": "sampled", "max_new_tokens": RESPONSE},
    },
    "supervised again": {"teacher": LOCAL},
}


def tasks(number: int, tokenizer: Any) -> PromptDataset:
    """Return seed tasks; the teacher's prompt with a context has 32 tokens more."""
    data = PromptDataset.encode(read("seed_tasks"), tokenizer, Rules(max_prompt_tokens=256))
    made = [replace(row, teacher_prompt_ids=[5] * 32 + row.prompt_ids) for row in data.rows]
    return PromptDataset(made[:number])


def equal_rows(number: int) -> PromptDataset:
    """Return rows of random ids; the teacher's prompt with a context is 32 tokens longer."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (number, 32 + PROMPT + RESPONSE), generator=draw).tolist()
    made = [
        Row(place, row[32 : 32 + PROMPT], row[32 + PROMPT :], {}, row[: 32 + PROMPT])
        for place, row in enumerate(ids)
    ]
    return PromptDataset(made)


def recipe_of(name: str, steps: int) -> recipes.Recipe:
    shared = {
        "output": "-",
        "student": STUDENT,
        "data": {"train": "-.jsonl"},
        "training": {
            "max_steps": steps, "per_device_train_batch_size": ROWS, "save_strategy": "no",
            "learning_rate": 1e-5,
        },
    }  # fmt: skip
    return recipes.build(shared | KINDS[name])


def measure(name: str, rounds: int, equal: bool) -> dict[str, Any]:
    """Return the seconds of a step and the memory.  Call it in a new process."""
    recipe, number = recipe_of(name, rounds + 1), ROWS * (rounds + 1)
    tokenizer = load_student_tokenizer(recipe)
    data = equal_rows(number) if equal else tasks(number, tokenizer)
    benchmark.reset_peak()
    before = benchmark.peak_mib()
    teacher, student = load_pair(recipe, tokenizer, data)
    # No row ends early, so that each kind trains on as many tokens.
    if recipe.rollout.new_tokens:
        student.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(recipe, Path(folder))
        trainer = build_trainer(recipe, arguments, teacher, student, tokenizer, data)
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
    tokens = [entry["predicted_tokens"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": statistics.median(clock.seconds[1:]),
        "tokens": statistics.median(tokens[1:]),
        "MiB": benchmark.peak_mib() - before,
        "parts": {part: size / 2**20 for part, size in memory(recipe, data).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--rounds", type=int, default=3, help="number of measured steps")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--equal", action="store_true", help="use rows of equal lengths")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, options.rounds, options.equal)))
        return
    shared = ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    shared += ["--equal"] * options.equal
    found = {}
    for name in KINDS:
        command = [sys.executable, __file__, "--one", name, *shared]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], file=sys.stderr, flush=True)
    report(options.write, found, options.equal)


def report(path: str | None, found: dict[str, dict[str, Any]], equal: bool) -> None:
    first, written = found["supervised"], found["on-policy"]
    times = [
        {
            "teacher": name,
            "time / supervised": one["seconds"] / first["seconds"],
            "time / on-policy": one["seconds"] / written["seconds"],
            "memory / supervised": one["MiB"] / first["MiB"],
            "seconds": one["seconds"],
            "MiB": round(one["MiB"]),
            "predicted tokens": round(one["tokens"]),
        }
        for name, one in found.items()
    ]
    names = dict.fromkeys(part for one in found.values() for part in one["parts"])
    parts = [
        {"part": part}
        | {name: round(one["parts"].get(part, 0)) or "-" for name, one in found.items()}
        for part in names
    ]
    text = [
        f"One step of {ROWS} "
        + (f"rows of {PROMPT} + {RESPONSE} tokens" if equal else "of the package's seed tasks")
        + f": the embedded teacher and a copy with {LAYERS} of its 30 layers.",
        benchmark.table(times),
        "Memory by part in MiB, as `llmdistill check` estimates it:",
        benchmark.table(parts),
    ]
    benchmark.report(path, "The cost of each kind of teacher", text)


if __name__ == "__main__":
    main()
