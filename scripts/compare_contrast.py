"""Held-out figures after training with KL, and with contrast or changed inputs in addition.

    python scripts/compare_contrast.py DATA [--write docs/results/contrast.md]

DATA is a folder with gsm8k_train.jsonl and gsm8k_test.jsonl.  Each term has the weight of its
recipe, and runs with several seeds, which choose the order of the rows, the projectors and the
changes of inputs.  Terms on changed inputs run with 400 different rows, and with 200 that are read
twice.  Runs that are done are kept in --results, and are not made again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import benchmark
import torch
from study import (
    FIGURES,
    KL,
    LAYERS,
    LONGEST_PROMPT,
    LONGEST_RESPONSE,
    NEW_TOKENS,
    STEPS,
    Study,
    kept,
)

from llmdistill.teachers.pruned import PrunedTeacher

PROMPTS = 24
Terms = list[dict[str, Any]]
CORRELATION: dict[str, Any] = {"kind": "correlation"}
LABELS: dict[str, Any] = {"kind": "cross_entropy"}
ROBUST: dict[str, Terms] = {
    "labels + correlation, pruned teacher": [LABELS, CORRELATION],
    "R2KD: also on dropped tokens": [
        LABELS,
        CORRELATION,
        {"kind": "token_dropout", "of": CORRELATION},
    ],
}
DROPPED: dict[str, Terms] = {
    "KL": [KL],
    "KL + token_dropout": [KL, {"kind": "token_dropout"}],
} | ROBUST
CONTRASTS: dict[str, Terms] = {
    "KL": [KL],
    "KL + icd": [KL, {"kind": "icd"}],
    "KL + crd": [KL, {"kind": "crd", "queue_size": 512, "weight": 0.8}],
    "KL + rrd": [KL, {"kind": "rrd", "queue_size": 512}],
}
INPUTS: dict[str, Terms] = {
    "KL": [KL],
    "KL + mixkd": [KL, {"kind": "mixkd"}],
    "KL + adversarial": [KL, {"kind": "adversarial", "weight": 0.5}],
}


class Part(NamedTuple):
    """Runs that can be compared: rows of a step, rows of the dataset, terms and seeds."""

    batch: int
    rows: int
    terms: Mapping[str, Terms]
    seeds: tuple[int, ...] = (0, 1, 2)


PARTS = {
    "contrast": Part(8, 800, CONTRASTS),
    "inputs": Part(4, 400, INPUTS),
    "few rows": Part(4, 200, INPUTS),
    "dropped tokens": Part(4, 400, DROPPED, seeds=(0,)),
}


class StudyOfSeeds(Study):
    """The study on GSM8K, with a pruned teacher for R2KD."""

    def __init__(self, data: Path) -> None:
        files = (data / f"gsm8k_{name}.jsonl" for name in ("train", "test"))
        named = [terms for part in PARTS.values() for terms in part.terms.values()]
        sections = [one for terms in named for one in terms]
        super().__init__(*files, sections, held_out=PROMPTS)
        self.remembered: tuple[int, ...] = ()
        self.pruned = PrunedTeacher.of(self.teacher, share=0.1, pruned_weight=0.3)

    def seeded(self, part: Part, name: str, seed: int) -> dict[str, Any]:
        """Train a student on the terms of this name; return its figures."""
        if self.remembered != (part.batch, part.rows, seed):  # others have other batches
            self.teacher.signals.clear()
        self.remembered, self.batch = (part.batch, part.rows, seed), part.batch
        return self.run(
            part.terms[name],
            seed=seed,
            teacher=self.pruned if name in ROBUST else self.teacher,
            train_dataset=type(self.train)(self.train.rows[: part.rows]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--results", type=Path, default=Path("compare_contrast.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = StudyOfSeeds(options.data)
    before = kept(options.results, "before", study.measure, study.student)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for title in options.parts:
        part = PARTS[title]
        for seed in part.seeds:
            for name in part.terms:
                key = f"{name}, {part.batch} of {part.rows} rows, seed {seed}"
                result = kept(options.results, key, study.seeded, part, name, seed)
                found.setdefault(title, {}).setdefault(name, []).append(result)
    report(options.write, before, found)


def report(
    path: str | None, before: dict[str, Any], found: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    parts = [
        f"The embedded teacher and a copy with {LAYERS} of its 30 layers: {STEPS} steps on GSM8K "
        f"with the dataset's responses. Questions have at most {LONGEST_PROMPT} tokens, and "
        f"responses are cut at {LONGEST_RESPONSE}. Figures are those of `llmdistill evaluate` on "
        f"{PROMPTS} test questions, with {NEW_TOKENS} new tokens: the mean over the seeds, and the "
        "largest distance of a seed from it. Weights are those of the recipes. The number of steps "
        "is the same in each run; terms on changed inputs make further passes in a step."
    ]
    untrained = {"objectives": "before"} | {name: f"{before[name]:.3f}" for name in FIGURES}
    for title, named in found.items():
        part = PARTS[title]
        rows = [untrained, *({"objectives": name} | _spread(runs) for name, runs in named.items())]
        seeds = ", ".join(map(str, part.seeds))
        parts += [
            f"## {title[0].upper()}{title[1:]}",
            f"{STEPS} steps of {part.batch} rows, {part.rows} different ones; seeds {seeds}.",
            benchmark.table(rows),
        ]
    benchmark.report(path, "What contrast and changed inputs add to KL", parts)


def _spread(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Return the mean of each figure, and the largest distance of a run from it."""
    found = {}
    for name in FIGURES:
        values = [run[name] for run in runs]
        mean = statistics.mean(values)
        found[name] = f"{mean:.3f}"
        if len(values) > 1:
            found[name] += f" ± {max(abs(one - mean) for one in values):.3f}"
    return found


if __name__ == "__main__":
    main()
