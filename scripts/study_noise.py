"""How much wrong responses, and a mixture of tasks that is out of balance, harm each method.

    python scripts/study_noise.py DATA [--write docs/results/noise.md]

The questions are those of Sarfraz et al. 2020, "Knowledge distillation beyond model compression",
for language models.  DATA is a folder with two tasks: instructions_seed.jsonl, and
gsm8k_train.jsonl with gsm8k_test.jsonl.  In one part the responses of a share of the rows are
replaced by those of other rows.  In the other there are many rows of one task for each row of the
other task.  Held-out rows are right and balanced.  Runs that are done are kept in --results, and
are not made again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark
import torch
from study import KL, LAYERS, LONGEST_RESPONSE, Study, kept

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.sources import read
from llmdistill.data.table import Row
from llmdistill.forward import read as forward
from llmdistill.objectives.labels import cross_entropy
from llmdistill.protocols import Progress
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.teachers.local import LocalTeacher

START = Progress(step=0, epoch=0, seed=0)
BATCH, STEPS, ROWS, HELD_OUT = 4, 60, 160, 24
SHARES, RATIOS = (0.0, 0.2, 0.4, 0.6), (1, 10, 50)
LABELS: dict[str, Any] = {"kind": "cross_entropy"}
METHODS = ("SFT", "supervised KD", "on-policy", "self-distillation")
NUMBERS = ("loss_instructions", "loss_gsm8k", "accuracy_instructions", "accuracy_gsm8k")


def corrupted(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Return the rows, with the responses of a share of them replaced by those of other rows.

    floor(share * rows) rows are changed, and each of them gets another response than its own.  A
    larger share changes the same rows and more.  Equal seeds give equal rows.
    """
    draw, changed = random.Random(seed), list(rows)
    for place in draw.sample(range(len(rows)), len(rows))[: int(share * len(rows) + 1e-9)]:
        own = list(rows[place].response_ids)
        others = [row.response_ids for row in rows if list(row.response_ids) != own]
        chosen = random.Random(f"{seed} {place}").choice(others)
        changed[place] = replace(rows[place], response_ids=list(chosen))
    return changed


def imbalanced(common: Sequence[Row], rare: Sequence[Row], ratio: float, number: int) -> list[Row]:
    """Return `number` rows, `ratio` of the common task for each one of the rare task."""
    few = max(1, round(number / (1 + ratio)))
    return [*rare[:few], *common[: number - few]]


class StudyOfNoise(Study):
    """Two tasks, and what each method makes of their rows."""

    def __init__(self, data: Path, seed: int) -> None:
        files = (data / f"gsm8k_{name}.jsonl" for name in ("train", "test"))
        super().__init__(*files, [], batch=BATCH, steps=STEPS)
        self.seed = seed
        test = self.encoded(read(str(data / "gsm8k_test.jsonl"))).rows
        tasks = self.encoded(read(str(data / "instructions_seed.jsonl"))).rows
        # The rows to train on and the held-out ones.
        self.rows: dict[str, tuple[Sequence[Row], Sequence[Row]]] = {
            "instructions": (tasks[:-HELD_OUT], tasks[-HELD_OUT:]),
            "gsm8k": (self.train.rows, test[:HELD_OUT]),
        }

    def mixture(self, ratio: float = 1) -> list[Row]:
        common, rare = (self.rows[task][0] for task in ("gsm8k", "instructions"))
        found = imbalanced(common, rare, ratio, ROWS)
        return [replace(row, row_id=place) for place, row in enumerate(found)]

    def method(self, name: str, rows: Sequence[Row]) -> dict[str, Any]:
        """Train a student on the rows; return its held-out figures."""
        self.teacher.signals.clear()
        dataset = PromptDataset(rows)
        if name == "on-policy":
            rollout = SampledRollout("student", max_new_tokens=40)
            student = self._trained([KL], dataset, rollout=rollout)
        elif name == "supervised KD":
            student = self._trained([KL], dataset)
        else:
            student = self._trained([LABELS], dataset)
            if name == "self-distillation":  # the next generation of born-again networks
                earlier = LocalTeacher(student, self.teacher.tokenizer)
                student = self._trained([LABELS, KL], dataset, teacher=earlier)
        return self.held_out(student)

    def _trained(self, sections: list[dict[str, Any]], rows: PromptDataset, **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, sections, seed=self.seed, train_dataset=rows, **options)
            trainer.train()
        return trainer.model.student.eval()

    @torch.no_grad()
    def held_out(self, student: Any) -> dict[str, float]:
        """Return the loss in nats and the accuracy of the tokens of held-out responses, by task."""
        found = {}
        for task, (_, rows) in self.rows.items():
            batch = FixedRollout().write(collate(rows), student, self.teacher, START)
            view = forward(student, batch, self.teacher.num_tokens)
            logits_NV = view.head(view.hidden_NH).float()
            found[f"loss_{task}"] = float(cross_entropy(logits_NV, batch.targets_N).mean())
            right_N = logits_NV.argmax(-1) == batch.targets_N
            found[f"accuracy_{task}"] = float(right_N.float().mean())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", help="also write the page and its plot, as Markdown and SVG")
    parser.add_argument("--results", type=Path, default=Path("study_noise.json"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of training")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = StudyOfNoise(options.data, options.seed)
    noisy: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    uneven: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for name in METHODS:
        for share in SHARES:
            # The student writes its responses, so those of the dataset have no effect.
            used = 0.0 if name == "on-policy" else share
            rows = corrupted(study.mixture(), used, options.seed)
            key = f"{name}, {used:.0%} replaced, seed {options.seed}"
            noisy[name].append(kept(options.results, key, study.method, name, rows))
        for ratio in RATIOS:
            rows = study.mixture(ratio)
            key = f"{name}, 1:{ratio}, seed {options.seed}"
            if ratio == 1:
                key = f"{name}, 0% replaced, seed {options.seed}"
            uneven[name].append(kept(options.results, key, study.method, name, rows))
    before = kept(options.results, "before", study.held_out, study.student)
    report(options, before, noisy, uneven)


def report(
    options: argparse.Namespace,
    before: dict[str, Any],
    noisy: dict[str, list[dict[str, Any]]],
    uneven: dict[str, list[dict[str, Any]]],
) -> None:
    parts = [
        f"The embedded teacher and a copy with {LAYERS} of its 30 layers: {STEPS} steps of {BATCH} "
        f"rows, {ROWS} different ones, half of them GSM8K and half the seed tasks of "
        f"Self-Instruct. Figures are on the responses of {HELD_OUT} held-out rows of each task, "
        f"which are cut at {LONGEST_RESPONSE} tokens like those to train on: "
        "the loss in nats per token, and the share of tokens that are the student's first choice. "
        f"One seed ({options.seed}). Before training: {_words(before)}.",
        "## Responses that belong to other rows",
        "The student writes the responses itself with on-policy distillation, so wrong responses "
        "in the dataset have no effect there: it is one run. `rise` is that of the mean loss.",
        benchmark.table(_rows(noisy, [f"{share:.0%}" for share in SHARES], "replaced", _loss)),
        "## Tasks out of balance",
        "Rows of GSM8K for each row of the instructions, with the same number of rows in all. "
        "`rise` is that of the loss on the instructions.",
        benchmark.table(
            _rows(uneven, [f"{one}:1" for one in RATIOS], "gsm8k : instructions", _rare)
        ),
    ]
    if options.write:
        picture = Path(options.write).with_suffix(".svg")
        plot(noisy, uneven, picture)
        parts.insert(1, f"![loss by share of wrong responses and by ratio]({picture.name})")
    benchmark.report(options.write, "Wrong responses and tasks out of balance", parts)


def _rows(
    found: dict[str, list[dict[str, Any]]],
    values: Sequence[str],
    title: str,
    loss: Callable[[dict[str, Any]], float],
) -> list[dict[str, str]]:
    return [
        {"method": name, title: value}
        | {key: f"{run[key]:.3f}" for key in NUMBERS}
        | {"rise": f"{loss(run) / loss(runs[0]) - 1:+.1%}"}
        for name, runs in found.items()
        for value, run in zip(values, runs, strict=True)
    ]


def _loss(run: dict[str, Any]) -> float:
    return (run["loss_instructions"] + run["loss_gsm8k"]) / 2


def _rare(run: dict[str, Any]) -> float:
    return run["loss_instructions"]


def _words(run: dict[str, Any]) -> str:
    return ", ".join(f"{key} {run[key]:.3f}" for key in NUMBERS)


def plot(
    noisy: dict[str, list[dict[str, Any]]], uneven: dict[str, list[dict[str, Any]]], path: Path
) -> None:
    import matplotlib.pyplot as plt  # only needed with --write

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name in METHODS:
        shares = [100 * share for share in SHARES]
        left.plot(shares, [_loss(run) for run in noisy[name]], "o-", label=name)
        right.plot(RATIOS, [_rare(run) for run in uneven[name]], "o-", label=name)
    left.set(xlabel="% of responses replaced", ylabel="nats per token", title="both tasks")
    right.set(xlabel="rows of GSM8K for each instruction", xscale="log", title="instructions")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})  # a date would change the file in every run


if __name__ == "__main__":
    main()
