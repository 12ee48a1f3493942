"""How much each predicted token counts.

T = tokens, B = sequences, N = predicted tokens.  Weights multiply the losses and are never
renormalised.  The sum is divided by the number of predicted tokens of the step, unless DIVISORS
names another count. To add one: a function of (sequences, *, options) here and its name in
TOKEN_WEIGHTS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from llmdistill.batch import Sequences

TokenWeight = Callable[..., Tensor]  # (sequences, *, options) -> (N,)


def uniform(sequences: Sequences) -> Tensor:
    """Every predicted token counts once: (N,)."""
    return torch.ones(len(sequences.targets_N), device=sequences.input_ids_BT.device)


def sequence_mean(sequences: Sequences) -> Tensor:
    """1 / length: every response counts once, whatever its length: (N,).

    The step's sum is divided by its number of responses.  Agarwal et al. 2024 (GKD), eq. 2.
    """
    num_predicted_B = sequences.num_predicted
    return (1.0 / num_predicted_B.clamp_min(1)).repeat_interleave(num_predicted_B)


TOKEN_WEIGHTS: dict[str, TokenWeight] = {"uniform": uniform, "sequence_mean": sequence_mean}


def predicted_tokens(sequences: Sequences) -> Tensor:
    """Predicted tokens of a batch: ()."""
    return sequences.num_predicted.sum()


def responses(sequences: Sequences) -> Tensor:
    """Responses with at least one predicted token: ()."""
    return (sequences.num_predicted > 0).sum()


# What a weighted sum is divided by over a step, where that is not the number of tokens.
DIVISORS: dict[TokenWeight, Callable[[Sequences], Tensor]] = {sequence_mean: responses}


def divisor_of(weight: TokenWeight) -> Callable[[Sequences], Tensor]:
    """The count that belongs to a token weight, its options bound or not."""
    plain = weight.func if isinstance(weight, functools.partial) else weight
    return next((count for one, count in DIVISORS.items() if one is plain), predicted_tokens)
