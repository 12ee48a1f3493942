"""What the studies on the embedded pair share: the models, the rows, the training and the figures.

The student is a copy of the embedded teacher with 10 of its 30 layers.  Every run of a study starts
from the same student.  Runs that are done are kept in a file and are not made again.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import TrainingArguments

from llmdistill import DistillTrainer, FixedRollout, LocalTeacher
from llmdistill import recipe as recipes
from llmdistill.batch import Sequences, TeacherSignal
from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.sources import read
from llmdistill.data.validate import Rules
from llmdistill.evaluation.measure import Evaluation
from llmdistill.models.build import build_student
from llmdistill.models.load import native_bfloat16
from llmdistill.models.taps import Need
from llmdistill.objectives.build import build_objectives

NAME = "smollm2-135m-instruct"
LAYERS, STEPS, BATCH, HELD_OUT, NEW_TOKENS = 10, 100, 4, 16, 32
LONGEST_PROMPT, LONGEST_RESPONSE, LEARNING_RATE = 72, 40, 2e-4
KL: dict[str, Any] = {"kind": "response"}
FIGURES = ("kl_teacher_text", "kl_own_text", "top1_agreement", "rouge_l_teacher")


class RememberingTeacher(LocalTeacher):
    """A teacher that scores each batch once, with all states that any of the runs needs."""

    def __init__(self, teacher: LocalTeacher, needs: frozenset[Need]) -> None:
        super().__init__(teacher.model, teacher.tokenizer)
        self.needs = needs
        self.signals: dict[bytes, TeacherSignal] = {}

    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        if sequences.embedding_change is not None:
            return super().judge(sequences, needs)
        key = sequences.input_ids_BT.numpy().tobytes()
        if key not in self.signals:
            self.signals[key] = super().judge(sequences, self.needs | needs)
        return self.signals[key]


class Study:
    """The pair, the rows and the measurements that all runs of a study share.

    Args:
        train: File of the rows to train on.
        held: File of the held-out rows.
        sections: Objectives that the runs use; the teacher keeps what they need of a batch.
        batch: Rows of a step.
        steps: Steps of a run.
        held_out: Number of held-out prompts.
    """

    def __init__(
        self,
        train: Path,
        held: Path,
        sections: Sequence[dict[str, Any]],
        *,
        batch: int = BATCH,
        steps: int = STEPS,
        held_out: int = HELD_OUT,
    ) -> None:
        self.batch, self.steps = batch, steps
        local = LocalTeacher.load(NAME, dtype="auto")
        self.rules = Rules(max_prompt_tokens=LONGEST_PROMPT, max_response_tokens=LONGEST_RESPONSE)
        self.teacher = RememberingTeacher(local, frozenset())
        self.train, asked = (self.encoded(read(str(file))) for file in (train, held))
        rows = collate(self.train.rows[:48])
        carve = recipes.CarveRecipe(layers=LAYERS, by="influence")
        section = recipes.StudentRecipe(model=NAME, carve=carve)
        sample = (rows.input_ids_BP, rows.attention_mask_BP)
        self.student = build_student(section, base=None, sample=sample, device="cpu", seed=0)
        self.evaluation = Evaluation(
            local, collate(asked.rows[:held_out]), max_new_tokens=NEW_TOKENS, seed=0
        )
        with tempfile.TemporaryDirectory() as folder:  # a trainer knows the layers of its terms
            made = self.trainer(folder, [KL, *sections])
        self.teacher = RememberingTeacher(local, made.model.teacher_needs)

    def encoded(self, rows: Any) -> PromptDataset:
        return PromptDataset.encode(rows, self.teacher.tokenizer, self.rules)

    def trainer(
        self, folder: str, sections: list[dict[str, Any]], *, seed: int = 0, **options: Any
    ) -> DistillTrainer:
        """Return a trainer of a copy of the student; `options` are arguments of the trainer."""
        given = {"output": "-", "teacher": {"model": NAME}, "student": {"model": NAME}}
        recipe = recipes.build(given | {"data": {"train": "-.jsonl"}, "objectives": sections})
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="no", max_steps=self.steps, learning_rate=LEARNING_RATE, warmup_steps=0.1,
            lr_scheduler_type="cosine", per_device_train_batch_size=self.batch, logging_steps=25,
            bf16=native_bfloat16(torch.device("cpu")), seed=seed,
        )  # fmt: skip
        parts = {
            "student": copy.deepcopy(self.student),
            "teacher": self.teacher,
            "rollout": FixedRollout(),
            "train_dataset": self.train,
            "objectives": build_objectives(recipe.objectives),
        }
        return DistillTrainer(
            **parts | options, args=arguments, processing_class=self.teacher.tokenizer
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

    def run(self, sections: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Train a student; return its figures and the log."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, sections, **options)
            trainer.train()
            return self.measure(trainer.model.student) | {"log": trainer.state.log_history}

    def measure(self, student: Any) -> dict[str, Any]:
        """Return the held-out figures of a student by name."""
        student.eval()
        figures = self.evaluation.measure(student).figures
        return {name: getattr(figures, name) for name in FIGURES}


def kept(
    path: Path, name: str, make: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """Return a result from the file, or make it and write it there."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    if name not in results:
        print(f"running {name}", file=sys.stderr, flush=True)
        results[name] = make(*arguments)
        path.write_text(json.dumps(results, indent=1))
    return results[name]
