"""Teachers for tests: every kind on toys, and one that uses every extension point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmdistill.batch import Dense, LossSum, TeacherSignal
from llmdistill.forward import read, teacher_signal
from llmdistill.models.taps import Need
from llmdistill.objectives.base import Objective
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import kl, log_probs
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.teachers.base import TrainableTeacher
from llmdistill.teachers.build import _BUILDERS as BUILDERS
from llmdistill.teachers.ensemble import EnsembleTeacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mutual import MutualTeacher
from llmdistill.teachers.online import OnlineTeacher
from llmdistill.teachers.reflexive import ReflexiveTeacher
from llmdistill.teachers.routed import CurriculumTeacher, RoutedTeacher, token_balance
from tests import toy
from tests.support import vision
from tests.training.helpers import dataset


class Learner(TrainableTeacher):
    """A frozen model with a trained shift of its final states, which moves towards the student."""

    provides = frozenset({Need.DISTRIBUTION, Need.HIDDEN})

    def __init__(self):
        super().__init__()
        self.base = toy.teacher_model().requires_grad_(False)
        self.config = self.base.config
        self.shift = nn.Parameter(torch.zeros(48))
        self.tokenizer = toy.tokenizer()

    def judge(self, sequences, needs):
        seen = read(self.base, sequences, toy.NUM_TOKENS, needs)
        return TeacherSignal(Dense(seen.hidden_NH + self.shift, seen.head), seen.states)

    def forward(self, student, signal, sequences):
        target = Dense(student.hidden_NH, student.head).serve()
        own = signal.distribution

        def position_loss(teacher_nV, rows):
            return kl(log_probs(target[rows]), log_probs(teacher_nV))

        ones_N = torch.ones(len(own.hidden_NH))
        total, _ = chunked_sum(own.hidden_NH, own.head, position_loss, ones_N)
        return LossSum(total, sequences.num_predicted.sum())


def seam_objectives() -> list[Objective]:
    """Divisors by responses, predicted tokens and all tokens; a projector; two layers."""
    return [
        ResponseObjective(token_weight="sequence_mean"),
        HiddenObjective(layers=[(2, 1)], weight=0.5),
        HiddenObjective("cosine", tokens="all", layers=[(1, -1)], weight=0.25),
    ]


def local(seed: int = 1, hidden: int = 48) -> LocalTeacher:
    return LocalTeacher(toy.teacher_model(seed=seed, hidden=hidden), toy.tokenizer())


def every_teacher() -> dict[str, Callable[[], dict[str, Any]]]:
    """Each kind of teacher, as a function that makes the arguments of a trainer on `dataset(7)`."""
    rows = dataset(7).rows
    route = {row.row_id: "ab"[row.row_id % 2] for row in rows}
    longer = {row.row_id: [*row.prompt_ids, 7, 8, 9] for row in rows}
    labels = [ResponseObjective(), CrossEntropyObjective()]

    def two() -> list[LocalTeacher]:
        return [local(), local(2, 32)]

    def named() -> dict[str, LocalTeacher]:
        return dict(zip("ab", two(), strict=True))

    def reflexive(**options: Any) -> dict[str, Any]:
        student = toy.model()
        teacher = ReflexiveTeacher(student, toy.tokenizer(), **options)
        return {"student": student, "teacher": teacher, "objectives": labels, "max_steps": 2}

    made: dict[str, Callable[[], Any]] = {
        "online": lambda: OnlineTeacher(toy.teacher_model(), toy.tokenizer(), drift_weight=0.1),
        "resting": lambda: OnlineTeacher(toy.teacher_model(), toy.tokenizer(), teacher_every=2),
        "mixture": lambda: EnsembleTeacher(two()),
        "sum": lambda: EnsembleTeacher(two(), mix="sum", weigh="likelihood"),
        "route": lambda: RoutedTeacher(named(), route, balance=token_balance(rows, route)),
        "curriculum": lambda: CurriculumTeacher(named(), rows),
        "mutual": lambda: MutualTeacher([toy.model(seed=s) for s in (3, 4)], toy.tokenizer()),
    }
    found: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda make=make: {"teacher": make(), "max_steps": 2} for name, make in made.items()
    }
    found["context"] = lambda: reflexive(prompts=longer)
    found["average"] = lambda: reflexive(weights="ema", ema_rate=0.3)
    return {f"teacher-{name}": options for name, options in found.items()}


def section_on_toys(section: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
    """Return the section with toy models in place of those that it names."""
    teacher, student = pair
    kind = next(one for one in BUILDERS if one.model_fields["kind"].default == section["kind"])
    local = {"model": teacher, "dtype": "float32"}
    own = {key: value for key, value in local.items() if key in kind.model_fields}
    if "teachers" in section:
        own = {"teachers": [one | local for one in section["teachers"]]}
    if "peers" in section:
        own = {"peers": [{"model": student, "carve": {"layers": 2}} for _ in section["peers"]]}
    if section["kind"] == "multimodal":
        own = {"model": vision.save(Path(student).parent / "seer"), "dtype": "float32"}
    return section | own


# ---- teachers that disagree, and their logits ----

NEEDS = frozenset({Need.DISTRIBUTION})
SIZES = ((1, 48), (2, 32), (3, 40))  # seed and width of three teachers that disagree


def experts(number=3):
    return [
        LocalTeacher(toy.teacher_model(seed=seed, hidden=hidden), toy.tokenizer(f"expert{seed}"))
        for seed, hidden in SIZES[:number]
    ]


def served(distribution):
    return distribution.serve()[0 : len(distribution)].clone()


def signal(teacher, sequences=None):
    sequences = toy.sequences() if sequences is None else sequences
    return teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS).distribution


def logits(teacher, sequences=None):
    return served(signal(teacher, sequences))
