"""Attention-based feature distillation (AFD), and its filter for useful layers of the teacher.

B = responses, M = layers of the student, N = layers of the teacher, T = predicted tokens of one
response, H and D = hidden size, d = width of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmdistill.batch import Sequences
from llmdistill.objectives.choices import choose
from llmdistill.objectives.layer_maps import Pairs, spread
from llmdistill.objectives.samples import mean, pooled, sum_of
from llmdistill.objectives.states import Compared, StateObjective, projected, tokens_of_rows
from llmdistill.objectives.weights import responses
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Filter = Callable[[Tensor], Tensor]  # logits (B, N, M) -> factors of the teacher's layers (B, N)
WIDTH = 128  # of queries and keys


def representative(logits_BNM: Tensor) -> Tensor:
    """Count the layers of the teacher more that some layer of the student is similar to.

    N softmax_N(max_M logits), for each layer of the teacher: (B, N), with mean 1.  Our reading of
    Yang et al. 2022 (RTK).  There are no options.
    """
    return logits_BNM.amax(2).softmax(1) * logits_BNM.shape[1]


def every(logits_BNM: Tensor) -> Tensor:
    """Count all layers of the teacher the same.

    1 for each layer of the teacher: (B, N).  Ji et al. 2021 (AFD).  There are no options.
    """
    return torch.ones_like(logits_BNM[:, :, 0])


# Recipes read the names with `ast`, so the table must stay a dict literal.
FILTERS: dict[str, Filter] = {"rtk": representative, "afd": every}


def token_energy(states_TH: Tensor) -> Tensor:
    """Return how strong the states of a response are at each token, as a unit vector: (T,).

    The mean over H of their squares, divided by the length over the tokens.  It does not depend on
    the width and the scale of the states.
    """
    return nn.functional.normalize(states_TH.square().mean(-1), dim=0)


def attended_distance(logits_BNM: Tensor, gap_BNM: Tensor, keep: Filter) -> Tensor:
    """Return the attended distance between the layers of both models, for each response: (B,).

    The mean over the teacher's layers n of r_n sum_m alpha_nm gap_nm, with alpha = softmax_m of the
    logits and the factors r of the filter.  Ji et al. 2021 (AFD) has r = 1.
    """
    attended_BN = (logits_BNM.softmax(2) * gap_BNM).sum(2)
    return (keep(logits_BNM) * attended_BN).mean(1)


class Attention(nn.Module):
    """The similarity of each layer of the teacher to each layer of the student: (B, N, M).

    logit = (query_n . key_nm + a_n . b_m) / sqrt(d), where queries and keys are projections of the
    pooled states, and a and b are learned positions.
    """

    def __init__(self, student: int, teacher: int, num_student: int, num_teacher: int) -> None:
        super().__init__()
        self.queries = nn.ModuleList(nn.Linear(teacher, WIDTH) for _ in range(num_teacher))
        self.keys = nn.ModuleList(nn.Linear(student, WIDTH) for _ in range(num_student))
        self.query_norm, self.key_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        shape = (num_teacher, num_student, WIDTH, WIDTH)
        self.pair_NMdd = nn.Parameter(torch.randn(shape) / WIDTH**0.5)
        self.teacher_Nd = nn.Parameter(torch.zeros(num_teacher, WIDTH))
        self.student_Md = nn.Parameter(torch.randn(num_student, WIDTH))

    def forward(self, student_BMH: Tensor, teacher_BNH: Tensor) -> Tensor:
        """Return the logits for the pooled states of all layers: (B, N, M)."""
        queries = [layer(teacher_BNH[:, place]) for place, layer in enumerate(self.queries)]
        keys = [layer(student_BMH[:, place]) for place, layer in enumerate(self.keys)]
        query_BNd = self.query_norm(torch.stack(queries, 1))
        key_BMd = self.key_norm(torch.stack(keys, 1)).relu()
        key_BNMd = torch.einsum("nmde,bme->bnmd", self.pair_NMdd, key_BMd)
        logits_BNM = torch.einsum("bnd,bnmd->bnm", query_BNd, key_BNMd)
        return (logits_BNM + self.teacher_Nd @ self.student_Md.T) / WIDTH**0.5


class RtkObjective(StateObjective):
    """Attention between the layers of both models decides which are compared.

    For each response, each layer of the teacher attends to the layers of the student.  The loss is
    the attended distance between the layers' token energies.  The queries and keys are trained with
    the student, and not exported.  The models may differ in width.  A response of one predicted
    token has no energies to compare, so it adds nothing.

    Args:
        filter: A name in `FILTERS`, or a function of the logits (B, N, M) that returns (B, N).
        num_layers: Number of layers of each model, which are evenly spaced.
        weight: Factor on the objective's mean over responses: a number, or a schedule over the run.
        projector_learning_rate: Learning rate of queries and keys.  None is that of the student.
    """

    name = "rtk"

    def __init__(
        self,
        *,
        filter: str | Filter = "rtk",
        num_layers: int = 4,
        weight: float | Schedule = 1.0,
        projector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(weight=weight, projector_learning_rate=projector_learning_rate)
        self.filter = choose("filter", filter, FILTERS)
        self.num_layers = num_layers

    def pairs(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> Pairs:
        """Return all pairs of the chosen layers of both models."""
        sides = [spread(c.num_hidden_layers, self.num_layers) for c in (student, teacher)]
        return [(mine, other) for other in sides[1] for mine in sides[0]]

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers, and create the attention between them."""
        super().prepare(student, teacher)
        assert teacher is not None
        sizes = (len(self.student_needs), len(self.teacher_needs))
        self.attention = Attention(student.hidden_size, teacher.hidden_size, *sizes)

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return the number of responses with a predicted token: ()."""
        return responses(sequences)

    def compare(self, states: Sequence[Compared], sequences: Sequences) -> Tensor:
        """Return the sum over responses of the attended distance."""
        num_student = len(self.student_needs)
        mine = [one.student_ND for one in states[:num_student]]
        others = [one.teacher_ND for one in states[::num_student]]
        counts = tokens_of_rows(sequences, self.tokens)
        if not counts:
            return sum_of([*mine, *self.parameters()]) * 0.0
        student_BMH, teacher_BNH = (
            torch.stack([pooled(one, counts, mean) for one in side], 1) for side in (mine, others)
        )
        logits_BNM = projected(self.attention, student_BMH, teacher_BNH)
        gaps = []
        for place in range(len(counts)):
            student_MT, teacher_NT = (
                torch.stack([token_energy(one.split(counts)[place]) for one in side])
                for side in (mine, others)
            )
            gaps.append((teacher_NT[:, None] - student_MT[None]).square().sum(-1))
        return attended_distance(logits_BNM, torch.stack(gaps), self.filter).sum()
