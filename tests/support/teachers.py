"""A teacher that trains along, and objectives that use every extension point with it."""

from __future__ import annotations

import torch
from torch import nn

from llmdistill.batch import Dense, LossSum, TeacherSignal
from llmdistill.forward import read
from llmdistill.models.taps import Need
from llmdistill.objectives.base import Objective
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import kl, log_probs
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import ResponseObjective
from llmdistill.teachers.base import TrainableTeacher
from tests import toy


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


def trained(trainer) -> torch.Tensor:
    """Return everything that a trainer trains, including the teacher's part."""
    return torch.cat(
        [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    ).clone()
