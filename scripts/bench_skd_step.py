"""Time of a training step in which both models write (SKD), and of one in which the student does.

    python scripts/bench_skd_step.py --student runs/quickstart/student [--write PATH]

The embedded teacher and its 20-layer student after the quickstart, with 8 prompts of 128 tokens and
answers of at most 128.  The student samples at temperature 0.5 and top-p 0.5 in both cases.  The
loss is forward KL, the optimizer AdamW.  Trainers run in turn, each time with a fresh student.
Times are medians without the first step of each run, which tries out the block size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import benchmark
import torch
from bench_rollouts import OWN, TEACHER
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill import (
    DistillTrainer,
    InterleavedRollout,
    LocalTeacher,
    ResponseObjective,
    SampledRollout,
)
from llmdistill.data.collate import PromptDataset
from llmdistill.data.sources import read
from llmdistill.data.table import Row
from llmdistill.models.load import load_model, load_tokenizer
from llmdistill.training.progress import StepClock

PROMPT, NEW, BATCH = 128, 128, 8


def rows(tokenizer: Any, number: int) -> PromptDataset:
    """Return the joined texts of the seed tasks, cut into prompts of equal length."""
    text = " ".join(f"{row['instruction']} {row['output']}" for _, row in read("seed_tasks"))
    ids = tokenizer(text)["input_ids"]
    cuts = [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(number)]
    return PromptDataset([Row(i, prompt, None) for i, prompt in enumerate(cuts)])


def run(rollout: Any, options: argparse.Namespace) -> tuple[list[float], list[dict[str, float]]]:
    """Train with `rollout`; return the seconds and the log of each step but the first."""
    tokenizer = load_tokenizer(TEACHER)
    teacher = LocalTeacher(load_model(TEACHER, dtype=options.dtype), tokenizer)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=options.steps, logging_steps=1,
            learning_rate=1e-4, use_cpu=not torch.cuda.is_available(), save_strategy="no",
            report_to="none", disable_tqdm=True, bf16=options.dtype == "bfloat16",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DistillTrainer(
            student=load_model(options.student, dtype="float32"), teacher=teacher, rollout=rollout,
            objectives=[ResponseObjective("forward_kl")], args=arguments, callbacks=[clock],
            train_dataset=rows(tokenizer, BATCH * options.steps), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return clock.seconds[1:], logged[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument(
        "--student", required=True, help="folder of a student of the embedded teacher"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16" if torch.cuda.is_available() else "float32",
        help="dtype of the teacher; with bfloat16 the student trains under autocast",
    )
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    samplings = {"student_sampling": OWN["student"], "teacher_sampling": OWN["teacher"]}
    variants = {
        "the student": lambda: SampledRollout(sampling=OWN["student"], max_new_tokens=NEW),
        "both (SKD)": lambda: InterleavedRollout(max_new_tokens=NEW, **samplings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    logs: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    # The variants take turns, so a slow phase of the machine affects both.
    for _ in range(options.rounds):
        for name, rollout in variants.items():
            found = run(rollout(), options)
            seconds[name] += found[0]
            logs[name] += found[1]
    median = {name: statistics.median(some) for name, some in seconds.items()}

    # Answers can differ in length, so the time per token is compared as well.
    def _per_token(name: str) -> float:
        return median[name] / statistics.mean(e["predicted_tokens"] for e in logs[name])

    table = [
        {
            "who writes": name,
            "seconds per step": median[name],
            "tokens per step": _mean(logs[name], "predicted_tokens"),
            "written tokens/s": _mean(logs[name], "written_per_second"),
            "accepted": _mean(logs[name], "acceptance"),
            "tokens per teacher pass": _mean(logs[name], "tokens_per_teacher_pass"),
            "time / the student's": median[name] / median["the student"],
            "time per token / the student's": _per_token(name) / _per_token("the student"),
        }
        for name in variants
    ]
    about = (__doc__ or "").split("\n\n")[2].strip()
    benchmark.report(
        options.write, "A step of SKD", [f"{about}  {options.dtype}.", benchmark.table(table)]
    )


def _mean(logs: list[dict[str, float]], key: str) -> float | str:
    found = [entry[key] for entry in logs if key in entry]
    return statistics.mean(found) if found else ""


if __name__ == "__main__":
    main()
