"""MiniLM: the relations between the tokens of a response, inside the attention.

A = relation heads, B = rows, N = tokens of all rows, T = tokens of one row, D = width of queries,
keys or values, d = D / A.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from llmdistill.batch import Sequences
from llmdistill.errors import ModelError
from llmdistill.models.taps import Need
from llmdistill.objectives.divergences import kl
from llmdistill.objectives.eager import eager_sum
from llmdistill.objectives.layer_maps import LAST_LAYERS, Layers
from llmdistill.objectives.states import (
    Compared,
    StateObjective,
    num_tokens_compared,
    tokens_of_rows,
)
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NARROWEST = 16  # numbers in a relation head: 768 / 48 in the paper
MASKED = -1e30  # finite, because 0 * (-inf - -inf) would be NaN


def relation_kl(student_TD: Tensor, teacher_TD: Tensor, heads: int) -> Tensor:
    """Compare how strongly each token of a row relates to the tokens before it: (T,), in nats.

    The mean over relation heads of KL(R_teacher || R_student), for each token, with R = softmax(X
    X^T / sqrt(d)) over the tokens up to it.  Wang et al. 2021 (MiniLMv2), with a causal mask.
    `heads` must divide both widths, which may differ.
    """
    student_ATT, teacher_ATT = (_log_relation(x, heads) for x in (student_TD, teacher_TD))
    return kl(teacher_ATT, student_ATT).mean(0)


def _log_relation(states_TD: Tensor, heads: int) -> Tensor:
    """Return the logarithm of the relation R of each head: (A, T, T)."""
    x_ATd = states_TD.unflatten(1, (heads, -1)).transpose(0, 1)
    scores_ATT = x_ATd @ x_ATd.transpose(1, 2) / x_ATd.shape[-1] ** 0.5
    later_TT = torch.ones(scores_ATT.shape[1:], dtype=torch.bool, device=scores_ATT.device).triu(1)
    return scores_ATT.masked_fill(later_TT, MASKED).log_softmax(-1)


class MiniLMObjective(StateObjective):
    """The relations between queries, between keys, and between values, as in MiniLMv2.

    The states of all attention heads are joined, and then divided into relation heads.  So the
    models may differ in width and in their numbers of heads.  Queries and keys are those before the
    rotary embedding.  The three relations count the same.  The first token of a row relates to
    itself alone and adds 0.  Only the relations of one row and one layer are in memory at a time.

    Args:
        relation_heads: Number of relation heads.  It must divide the widths of queries, keys and
            values of both models.  None takes the largest such number whose heads have at least 16
            numbers.
        layers: Pairs of layers, as in `StateObjective`.  The paper takes an upper-middle layer of a
            deep teacher.
        weight: Factor on the objective's mean over tokens: a number, or a schedule over the run.

    Raises:
        ModelError: `relation_heads` does not divide a width.  It is raised when the trainer is
            built.
    """

    name = "minilm"
    parts: ClassVar[tuple[Need, ...]] = (Need.QUERIES, Need.KEYS, Need.VALUES)

    def __init__(
        self,
        *,
        relation_heads: int | None = None,
        layers: Layers = LAST_LAYERS,
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(layers=layers, tokens="all", weight=weight)
        self.relation_heads = relation_heads
        self.heads = relation_heads or 1  # `prepare` chooses the number if none is given

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers and the number of relation heads."""
        super().prepare(student, teacher)
        assert teacher is not None
        widths = {"student": attention_widths(student), "teacher": attention_widths(teacher)}
        every = [width for some in widths.values() for width in some]
        divisors = [n for n in range(1, min(every) + 1) if all(width % n == 0 for width in every)]
        if self.relation_heads is None:
            fitting = [number for number in divisors if min(every) // number >= NARROWEST]
            self.heads = max(fitting, default=1)
        elif self.relation_heads not in divisors:
            raise ModelError(
                f"minilm: relation_heads is {self.relation_heads}, but it must divide the widths "
                f"of queries, and of keys and values: {widths['student']} in the student and "
                f"{widths['teacher']} in the teacher. Use one of {', '.join(map(str, divisors))}."
            )

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return the number of tokens of prompts and responses: ()."""
        return num_tokens_compared(sequences, self.tokens)

    def compare(self, states: Sequence[Compared], sequences: Sequences) -> Tensor:
        """Return the sum of the three relations' KL over all tokens of one micro-batch."""
        lengths = tokens_of_rows(sequences, self.tokens)
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        rows = [slice(start, end) for start, end in pairwise(ends)]
        totals = []
        for mine_ND, other_ND in states:

            def of_row(row: int, mine_ND: Tensor, other_ND: Tensor = other_ND) -> Tensor:
                return relation_kl(mine_ND[rows[row]], other_ND[rows[row]], self.heads).sum()

            totals.append(eager_sum(of_row, len(rows), mine_ND))
        return torch.stack(totals).sum() * len(self.parts) / len(states)


def attention_widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the widths of the queries, and of the keys and values, of all heads together."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
