"""Objectives on hidden states: the student's inner states match the teacher's.

B = responses, N = predicted tokens, or all tokens of the rows that have one.
H and D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from llmdistill.batch import Sequences
from llmdistill.models.taps import Tokens
from llmdistill.objectives.choices import choose
from llmdistill.objectives.layer_maps import LAST_LAYERS, Layers
from llmdistill.objectives.samples import POOLS, gather_together, pooled, share_of, sum_of
from llmdistill.objectives.states import (
    Compared,
    StateObjective,
    num_tokens_compared,
    projected,
    tokens_of_rows,
)
from llmdistill.objectives.weights import responses
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Distance = Callable[[Tensor, Tensor], Tensor]  # (student_NH, teacher_NH) -> (N,)
CKA_LEAST = 4  # samples that the unbiased estimate needs


def mse(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Compute the mean squared difference of the hidden states.

    sum_H (student - teacher)^2 / H, for each token: (N,).  Romero et al. 2015 (FitNets), eq. 3
    up to a constant factor.  There are no options.
    """
    return (student_NH - teacher_NH).square().mean(-1)


def normalized_mse(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Compute the squared difference of the hidden states, each divided by its length.

    sum_H (student / |student| - teacher / |teacher|)^2, for each token: (N,), from 0 to 4.  Sun et
    al. 2019 (PKD), the loss L_PT.  There are no options.
    """
    unit = nn.functional.normalize
    return (unit(student_NH, dim=-1) - unit(teacher_NH, dim=-1)).square().sum(-1)


def cosine(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Compute the cosine distance of the hidden states, which ignores their length.

    1 - cos of the angle between student and teacher, for each token: (N,), from 0 to 2.  Sanh et
    al. 2019 (DistilBERT), section 2.  There are no options.
    """
    return 1 - nn.functional.cosine_similarity(student_NH, teacher_NH, dim=-1)


def l2(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Compute the length of the difference of the hidden states.

    sqrt(sum_H (student - teacher)^2), for each token: (N,).  There are no options.
    """
    return torch.linalg.vector_norm(student_NH - teacher_NH, dim=-1)


# Recipes read the names with `ast`, so the table must stay a dict literal.
DISTANCES: dict[str, Distance] = {
    "mse": mse,
    "normalized_mse": normalized_mse,
    "cosine": cosine,
    "l2": l2,
}


def projector(student: PreTrainedConfig, teacher: PreTrainedConfig) -> nn.Module:
    """Return a linear map from the student's width to the teacher's; the identity if they agree.

    It has no bias.  Romero et al. 2015 (FitNets), section 2.2.
    """
    if student.hidden_size == teacher.hidden_size:
        return nn.Identity()
    return nn.Linear(student.hidden_size, teacher.hidden_size, bias=False)


class HiddenObjective(StateObjective):
    """A distance between hidden states of the student and of the teacher.

    If the models differ in width, a linear projector from the student's width to the teacher's is
    trained with the student, one for each pair of layers.

    Args:
        distance: A name in `DISTANCES`, or a function of two (N, H) tensors, the student's first,
            that returns (N,).
        layers: Pairs of layers, as in `StateObjective`.
        tokens: "predicted" or "all", as in `StateObjective`, or a name in `samples.POOLS`, which
            makes one vector of each response.  The sum is divided by the number of these tokens or
            responses.
        weight: Factor on the objective's mean: a number, or a schedule over the run.
        projector_learning_rate: Learning rate of the projectors.  None is that of the student.

    Raises:
        RecipeError: If a name is unknown.  A layer that a model does not have, or a layer map that
            does not fit, raises ModelError when the trainer is built.
    """

    name = "hidden"

    def __init__(
        self,
        distance: str | Distance = "mse",
        *,
        layers: Layers = LAST_LAYERS,
        tokens: Literal["predicted", "all", "mean", "last"] = "predicted",
        weight: float | Schedule = 1.0,
        projector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(
            layers=layers,
            tokens="all" if tokens == "all" else "predicted",
            weight=weight,
            projector_learning_rate=projector_learning_rate,
        )
        self.distance = choose("distance", distance, DISTANCES)
        each_token = tokens in ("predicted", "all")
        self.pool = None if each_token else choose("tokens", tokens, POOLS)
        self.projectors = nn.ModuleList()

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers, and create the projectors if the models differ in width."""
        super().prepare(student, teacher)
        assert teacher is not None
        self.projectors = nn.ModuleList(projector(student, teacher) for _ in self.needs)

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return the number of tokens or responses that the sum runs over: ()."""
        if self.pool is not None:
            return responses(sequences)
        return num_tokens_compared(sequences, self.tokens)

    def compare(self, states: Sequence[Compared], sequences: Sequences) -> Tensor:
        """Return the sum of the distances over one micro-batch, as a mean over the pairs."""
        totals = []
        for project, (mine_NH, other_NH) in zip(self.projectors, states, strict=True):
            if self.pool is not None:
                counts = tokens_of_rows(sequences, self.tokens)
                mine_NH, other_NH = (
                    pooled(side, counts, self.pool) for side in (mine_NH, other_NH)
                )
            totals.append(self.distance(projected(project, mine_NH), other_NH).sum())
        return torch.stack(totals).mean()


def cka(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Compute linear CKA (centred kernel alignment) of two sets of states, without bias: ().

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), with the Gram matrices K and L of the states and the
    unbiased estimate of HSIC (Song et al. 2012, eq. 5).  It is 1 for states that differ by a
    rotation, a factor and a shift, and about 0 for unrelated ones.  The widths may differ.
    Kornblith et al. 2019.  It needs at least 4 states.
    """
    student_NH, teacher_NH = _centred(student_NH), _centred(teacher_NH)
    own = hsic(student_NH, student_NH) * hsic(teacher_NH, teacher_NH)
    # The estimates of unrelated states may be 0 or below.
    return hsic(student_NH, teacher_NH) / own.clamp_min(1e-12).sqrt()


def hsic(x_NH: Tensor, y_NH: Tensor) -> Tensor:
    """Return n (n - 3) times the unbiased estimate of HSIC of centred states, linear kernels: ().

    Song et al. 2012, eq. 5.  The estimate leaves out the diagonals of both Gram matrices.  Because
    the states are centred, it needs only their H x H product and the lengths of the states.
    """
    n = len(x_NH)
    x_N, y_N = x_NH.square().sum(1), y_NH.square().sum(1)
    diagonals = (x_N * y_N).sum()
    product = (x_NH.T @ y_NH).square().sum()
    sums = x_N.sum() * y_N.sum() / ((n - 1) * (n - 2))
    return product - diagonals + sums - 2 * diagonals / (n - 2)


def _centred(states_NH: Tensor) -> Tensor:
    """Return the states with mean 0 and mean squared length 1, to keep rounding errors small."""
    centred_NH = states_NH - states_NH.mean(0)
    length = centred_NH.square().sum(1).mean().sqrt()
    return centred_NH / length.clamp_min(1e-12)


class CkaObjective(StateObjective):
    """One minus the linear CKA of the hidden states of both models.

    CKA compares how the tokens of a batch are placed relative to each other, so the models may
    differ in width without a projector.

    Args:
        layers: Pairs of layers, as in `StateObjective`.
        tokens: "predicted" or "all", as in `StateObjective`.
        weight: Factor on the objective: a number, or a schedule over the run.
    """

    name = "cka"
    compares_samples = True

    def __init__(
        self,
        *,
        layers: Layers = LAST_LAYERS,
        tokens: Tokens = "predicted",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(layers=layers, tokens=tokens, weight=weight)

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return the number of tokens that are compared: ()."""
        return num_tokens_compared(sequences, self.tokens)

    def compare(self, states: Sequence[Compared], sequences: Sequences) -> Tensor:
        """Return 1 - CKA of all ranks' tokens, times this rank's tokens."""
        own = len(states[0].student_ND)
        found = gather_together([side_ND for pair in states for side_ND in pair])
        everyone = len(found[0])
        if everyone < CKA_LEAST:
            return sum_of(found[::2]) * 0.0
        pairs = zip(found[::2], found[1::2], strict=True)
        losses = [1 - cka(mine_NH, other_NH) for mine_NH, other_NH in pairs]
        return share_of(torch.stack(losses).mean(), own, everyone)
