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
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import TrainingArguments

from llmdistill import DistillTrainer, FixedRollout, LocalTeacher
from llmdistill import recipe as recipes
from llmdistill.batch import Sequences, TeacherSignal
from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.sources import read
from llmdistill.data.validate import Rules
from llmdistill.evaluation.measure import Evaluation
from llmdistill.forward import read as forward
from llmdistill.models.build import build_student
from llmdistill.models.load import native_bfloat16
from llmdistill.models.taps import Need
from llmdistill.objectives.build import build_objectives
from llmdistill.objectives.layer_maps import carved

NAME = "smollm2-135m-instruct"
LAYERS, STEPS, BATCH, HELD_OUT, NEW_TOKENS = 10, 100, 4, 16, 32
LONGEST_PROMPT, LONGEST_RESPONSE, LEARNING_RATE = 72, 40, 2e-4
KL: dict[str, Any] = {"kind": "response"}
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
    "icd": {"kind": "icd"},
    "crd": {"kind": "crd", "queue_size": 512},
    "rrd": {"kind": "rrd", "queue_size": 512},
    "ckd": {"kind": "ckd"},
    "correlation": {"kind": "correlation"},
    "dist": {"kind": "dist"},
}
FIGURES = ("kl_teacher_text", "kl_own_text", "top1_agreement", "rouge_l_teacher")


class RememberingTeacher(LocalTeacher):
    """A teacher that scores each batch once, with all states that any of the runs needs."""

    def __init__(self, teacher: LocalTeacher, needs: frozenset[Need]) -> None:
        super().__init__(teacher.model, teacher.tokenizer)
        self.needs = needs
        self.signals: dict[bytes, TeacherSignal] = {}

    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        key = sequences.input_ids_BT.numpy().tobytes()
        if key not in self.signals:
            self.signals[key] = super().judge(sequences, self.needs | needs)
        return self.signals[key]


class Study:
    """The pair, the rows and the measurements that all runs share."""

    def __init__(self, data: Path) -> None:
        self.teacher = LocalTeacher.load(NAME, dtype="auto")
        tokenizer = self.teacher.tokenizer
        limits = {"max_prompt_tokens": LONGEST_PROMPT, "max_response_tokens": LONGEST_RESPONSE}
        files = (str(data / f"instructions_{name}.jsonl") for name in ("seed", "eval"))
        self.train, held = (
            PromptDataset.encode(read(file), tokenizer, Rules(**limits)) for file in files
        )
        rows = collate(self.train.rows[:48])
        carve = recipes.CarveRecipe(layers=LAYERS, by="influence")
        section = recipes.StudentRecipe(model=NAME, carve=carve)
        sample = (rows.input_ids_BP, rows.attention_mask_BP)
        self.student = build_student(section, base=None, sample=sample, device="cpu", seed=0)
        self.evaluation = Evaluation(
            self.teacher, collate(held.rows[:HELD_OUT]), max_new_tokens=NEW_TOKENS, seed=0
        )
        with tempfile.TemporaryDirectory() as folder:  # a trainer knows the layers of its terms
            made = self.trainer(folder, [KL, *TERMS.values()])
        self.teacher = RememberingTeacher(self.teacher, made.model.teacher_needs)

    def trainer(self, folder: str, sections: list[dict[str, Any]]) -> DistillTrainer:
        given = {"output": "-", "teacher": {"model": NAME}, "student": {"model": NAME}}
        recipe = recipes.build(given | {"data": {"train": "-.jsonl"}, "objectives": sections})
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="no", max_steps=STEPS, learning_rate=LEARNING_RATE, warmup_steps=0.1,
            lr_scheduler_type="cosine", per_device_train_batch_size=BATCH, logging_steps=25,
            bf16=native_bfloat16(torch.device("cpu")), seed=0,
        )  # fmt: skip
        return DistillTrainer(
            student=copy.deepcopy(self.student),
            teacher=self.teacher,
            rollout=FixedRollout(),
            objectives=build_objectives(recipe.objectives),
            args=arguments,
            train_dataset=self.train,
            processing_class=self.teacher.tokenizer,
        )

    def weighted(self, term: dict[str, Any]) -> dict[str, Any]:
        """Return the term with the weight that halves its gradient against that of KL."""
        with tempfile.TemporaryDirectory() as folder:
            norms = []
            for section in (KL, term):
                trainer = self.trainer(folder, [section])
                loader = iter(trainer.get_train_dataloader())
                inputs, _ = trainer.get_batch_samples(loader, 1, torch.device("cpu"))
                trainer.compute_loss(trainer.model, inputs[0]).backward()
                found = [p.grad for p in trainer.model.student.parameters() if p.grad is not None]
                norms.append(torch.stack([grad.norm() for grad in found]).norm().item())
        weight = float(f"{0.5 * norms[0] / norms[1]:.2g}")
        if term["kind"] != "flow":
            return term | {"weight": weight}
        # The inner weight begins at 10 times the last one, and fades.
        inner = {"kind": "critical_period", "start": 10 * weight}
        return term | {"weight": weight, "inner_weight": inner}

    def run(self, sections: list[dict[str, Any]]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, sections)
            trainer.train()
            return self.measure(trainer.model.student) | {"log": trainer.state.log_history}

    def measure(self, student: Any) -> dict[str, Any]:
        student.eval()
        figures = self.evaluation.measure(student).figures
        return {name: getattr(figures, name) for name in FIGURES} | {
            "cosines": self.cosines(student)
        }

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


def kept(path: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a result from the file, or make it and write it there."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    if name not in results:
        print(f"running {name}", file=sys.stderr)
        results[name] = make()
        path.write_text(json.dumps(results, indent=1))
    return results[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", help="also write the page to this Markdown file")
    parser.add_argument("--results", type=Path, default=Path("compare_objectives.json"))
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = Study(options.data)
    results = {"before": kept(options.results, "before", lambda: study.measure(study.student))}
    results["KL"] = kept(options.results, "KL", lambda: study.run([KL]))
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
