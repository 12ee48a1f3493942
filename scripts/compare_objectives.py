"""Held-out figures of the same student after training with KL alone, and with KL and each term.

    python scripts/compare_objectives.py DATA [--write docs/results/objectives.md]

DATA is a folder with instructions_seed.jsonl (rows to train on) and instructions_eval.jsonl
(held-out rows).  Every run starts from the same student, a copy of the embedded teacher with 10 of
its 30 layers, and sees the same rows in the same order.  A term's weight makes the norm of its
gradient on the first batch half of that of KL.  Runs that are done are kept in --results, and are
not made again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import benchmark
import torch
from study import BATCH, FIGURES, HELD_OUT, KL, LAYERS, NEW_TOKENS, STEPS, Study, kept
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill.forward import read as forward
from llmdistill.models.taps import Need
from llmdistill.objectives.layer_maps import carved

SHOWN_LAYERS = (2, 4, 6, 8, 10)
TERMS: dict[str, dict[str, Any]] = {
    "hidden (cosine)": {"kind": "hidden", "distance": "cosine", "layers": "carved"},
    "cka": {"kind": "cka", "layers": "carved"},
    "rtk": {"kind": "rtk"},
    "embed_distill": {"kind": "embed_distill"},
    "minilm": {"kind": "minilm"},
    "rkd": {"kind": "rkd"},
    "similarity": {"kind": "similarity"},
    "pkt": {"kind": "pkt"},
    "flow": {"kind": "flow", "layers": "carved"},
    "ckd": {"kind": "ckd"},
    "correlation": {"kind": "correlation"},
    "dist": {"kind": "dist"},
}


class StudyOfLayers(Study):
    """A study that also measures how close the layers of both models are."""

    def measure(self, student: Any) -> dict[str, Any]:
        return super().measure(student) | {"cosines": self.cosines(student)}

    @torch.no_grad()
    def cosines(self, student: Any) -> list[float]:
        """Cosine between each layer of the student and the layer that it was cut from."""
        pairs = carved(student.config, self.teacher.config)
        mine, other = ([Need.HIDDEN.after(pair[side]) for pair in pairs] for side in (0, 1))
        totals: list[Tensor] = []
        number = self.teacher.model.config.vocab_size
        for batch in self.evaluation.reference.batches:
            ours = forward(student, batch, number, mine).states
            theirs = forward(self.teacher.model, batch, number, other).states
            totals.append(
                torch.stack([
                    torch.cosine_similarity(ours[a].float(), theirs[b].float(), dim=-1)
                    for a, b in zip(mine, other, strict=True)
                ])
            )  # fmt: skip
        return torch.cat(totals, 1).mean(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--results", type=Path, default=Path("compare_objectives.json"))
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = (options.data / f"instructions_{name}.jsonl" for name in ("seed", "eval"))
    study = StudyOfLayers(*files, list(TERMS.values()))
    results = {"before": kept(options.results, "before", study.measure, study.student)}
    results["KL"] = kept(options.results, "KL", study.run, [KL])
    for name, term in TERMS.items():

        def make(term: dict[str, Any] = term) -> dict[str, Any]:
            section = study.weighted(term)
            return study.run([KL, section]) | {"weight": section["weight"]}

        results[name] = kept(options.results, name, make)
    report(options.write, results)


def report(path: str | None, results: dict[str, dict[str, Any]]) -> None:
    rows, cosines = [], []
    for name, found in results.items():
        label = name if name in ("before", "KL") else f"KL + {name}"
        weight = f"{found['weight']:g}" if "weight" in found else "-"
        rows.append(
            {"objectives": label, "weight": weight}
            | {figure: f"{found[figure]:.3f}" for figure in FIGURES}
        )
        mean = sum(found["cosines"]) / len(found["cosines"])
        cosines.append(
            {"objectives": label}
            | {f"layer {n}": f"{found['cosines'][n - 1]:.3f}" for n in SHOWN_LAYERS}
            | {"mean of all": f"{mean:.3f}"}
        )
    parts = [
        f"The embedded teacher and a copy with {LAYERS} of its 30 layers: {STEPS} steps of {BATCH} "
        f"rows with the responses of the dataset, the same seed, rows and student in each run. "
        f"Figures are those of `llmdistill evaluate` on {HELD_OUT} held-out prompts, with "
        f"{NEW_TOKENS} new tokens. A weight makes the norm of the term's gradient on the first "
        "batch half of that of KL. One seed and 16 prompts: differences of a few hundredths in KL "
        "and a few points in agreement are within the noise.",
        benchmark.table(rows),
        "Cosine between the states of a layer of the student and of the teacher's layer that it "
        "was cut from, at the predicted positions of the teacher's held-out answers:",
        benchmark.table(cosines),
    ]
    benchmark.report(path, "What each term adds to KL", parts)


if __name__ == "__main__":
    main()
