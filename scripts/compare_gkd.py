"""Losses of the same distillation by TRL's GKD and GOLD trainers and by llmdistill, step by step.

    python scripts/compare_gkd.py                                  one process
    torchrun --nproc_per_node 2 scripts/compare_gkd.py             two
    python scripts/compare_gkd.py --write docs/correctness.md      both, as the table of that file

All use the same toy pair, rows, divergence (JSD, beta 0.5), dataset answers and plain SGD.  Every
step uses all rows, so their order does not matter.  Without --write the script prints one line of
JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from llmdistill import DistillTrainer, FixedRollout, LocalTeacher, ResponseObjective
from tests import toy
from tests.training.helpers import arguments

STEPS, ROWS, LEARNING_RATE = 20, 8, 0.2
BEGIN, END = "<!-- compare_gkd -->", "<!-- /compare_gkd -->"
# The toys' template appends a newline to an end token.  TRL would train on it, so it is removed.
TEMPLATE = toy.TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")


class Losses(list):
    """Logged losses of a trainer, in order."""

    def __init__(self, trainer: object) -> None:
        history = trainer.state.log_history
        super().__init__(entry["loss"] for entry in history if "loss" in entry)


def rows() -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in toy.rows(ROWS)
    ]


def tokenizer():
    made = toy.tokenizer()
    made.chat_template = TEMPLATE
    return made


def ours(folder: str, world: int) -> list[float]:
    trainer = DistillTrainer(
        student=toy.model(rows=toy.NUM_TOKENS),
        teacher=LocalTeacher(toy.teacher_model(rows=toy.NUM_TOKENS), tokenizer()),
        rollout=FixedRollout(),
        objectives=[ResponseObjective("jsd", beta=0.5)],
        args=arguments(folder, **settings(world)),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    trainer.train()
    return Losses(trainer)


def theirs(folder: str, world: int, trainer_class: type, config_class: type) -> list[float]:
    names = ("use_cpu", "report_to", "disable_tqdm", "save_strategy", "optim", "lr_scheduler_type")
    base = arguments(folder, **settings(world))
    trainer = trainer_class(
        model=toy.model(rows=toy.NUM_TOKENS),
        teacher_model=toy.teacher_model(rows=toy.NUM_TOKENS),
        args=config_class(
            output_dir=folder,
            lmbda=0.0,  # never on-policy
            beta=0.5,
            temperature=1.0,
            # TRL changes some defaults of TrainingArguments; these are the values of our run.
            bf16=False,
            gradient_checkpointing=False,
            max_length=512,
            max_grad_norm=0.0,
            logging_steps=1,
            dataloader_pin_memory=False,
            **{name: getattr(base, name) for name in names},
            **settings(world),
        ),
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=tokenizer(),
    )
    trainer.train()
    return Losses(trainer)


def settings(world: int) -> dict:
    return {
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": ROWS // world,  # all rows in each step
    }


def compare() -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "ranks": world,
            "llmdistill": ours(folder, world),
            "TRL GKD": theirs(folder, world, GKDTrainer, GKDConfig),
            "TRL GOLD": theirs(folder, world, GOLDTrainer, GOLDConfig),
        }
    if world > 1:  # a launcher that failed would leave one process, and the table would be wrong
        assert torch.distributed.get_world_size() == world
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found))


def write(path: Path) -> None:
    """Write the table between the two marks of a Markdown file."""
    one, two = run([sys.executable]), run(["torchrun", "--nproc_per_node", "2"])
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "trl"))
    names = [name for name in one if name != "ranks"]
    columns = [found[name] for found in (one, two) for name in names]
    header = [f"{name}, {ranks}" for ranks in ("1 rank", "2 ranks") for name in names]
    lines = ["| step | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for step in (0, 1, 2, 4, 9, STEPS - 1):
        lines.append(f"| {step + 1} | " + " | ".join(f"{c[step]:.6f}" for c in columns) + " |")
    gaps = [
        max(abs(a - b) for a, b in zip(columns[0], other, strict=True)) for other in columns[1:]
    ]
    lines += [
        "",
        f"Largest difference from the first column over all {STEPS} steps: "
        + ", ".join(f"{gap:.1e}" for gap in gaps)
        + f". Measured on {date.today()} with {versions} by",
        "`python scripts/compare_gkd.py --write docs/correctness.md`.",
    ]
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join(lines)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def run(launcher: list[str]) -> dict:
    done = subprocess.run([*launcher, __file__], capture_output=True, text=True, check=True)
    return next(json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"ranks"'))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    else:
        compare()
