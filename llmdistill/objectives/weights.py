"""Token weights: how much each predicted token counts.

T = tokens, B = sequences, N = predicted tokens.  Weights multiply the losses and are never
renormalised.  The sum is divided by the number of predicted tokens of the step, unless DIVISORS
names another count.  To add one, write a function of (sequences, *, options) here and put its name
into TOKEN_WEIGHTS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from llmdistill.batch import Sequences

TokenWeight = Callable[..., Tensor]  # (sequences, *, options) -> (N,)


def uniform(sequences: Sequences) -> Tensor:
    """Count every predicted token the same, so that long responses weigh more than short ones.

    All weights are 1: (N,).  The step's sum is divided by its number of predicted tokens.  There
    are no options.
    """
    return torch.ones(len(sequences.targets_N), device=sequences.input_ids_BT.device)


def sequence_mean(sequences: Sequences) -> Tensor:
    """Count every response the same, whatever its length.

    The weight of a token is 1 / (predicted tokens of its response): (N,).  The step's sum is
    divided by its number of responses that have a predicted token.  Agarwal et al. 2024 (GKD),
    eq. 2.  There are no options.
    """
    num_predicted_B = sequences.num_predicted
    # The clamp only avoids 1 / 0: rows without a predicted token are repeated zero times.
    return (1.0 / num_predicted_B.clamp_min(1)).repeat_interleave(num_predicted_B)


# Recipes read the names with `ast`, so the table must stay a dict literal.
TOKEN_WEIGHTS: dict[str, TokenWeight] = {"uniform": uniform, "sequence_mean": sequence_mean}


def predicted_tokens(sequences: Sequences) -> Tensor:
    """Return the number of predicted tokens of a batch: ()."""
    return sequences.num_predicted.sum()


def responses(sequences: Sequences) -> Tensor:
    """Return the number of responses with at least one predicted token: ()."""
    return (sequences.num_predicted > 0).sum()


# The divisor of a weighted sum over a step, if that is not the number of predicted tokens.
DIVISORS: dict[TokenWeight, Callable[[Sequences], Tensor]] = {sequence_mean: responses}


def divisor_of(weight: TokenWeight) -> Callable[[Sequences], Tensor]:
    """Return the function that counts the divisor of a token weight.

    The weight may be a plain function or one with bound options.
    """
    plain = weight.func if isinstance(weight, functools.partial) else weight
    # Compared by identity, not looked up: a token weight can be a callable that has no hash.
    return next((count for one, count in DIVISORS.items() if one is plain), predicted_tokens)
