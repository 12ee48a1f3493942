"""How much each predicted token counts.

B = sequences, N = predicted tokens.  Weights multiply the losses; the divisor stays the number of
predicted tokens, so weights are never renormalised.  To add one: a function here and its name in
TOKEN_WEIGHTS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmdistill.batch import Sequences

TokenWeight = Callable[[Sequences], Tensor]


def uniform(sequences: Sequences) -> Tensor:
    """Every predicted token counts once: (N,)."""
    return torch.ones(len(sequences.targets_N), device=sequences.input_ids_BT.device)


def sequence_mean(sequences: Sequences) -> Tensor:
    """1 / length: every response counts once, whatever its length: (N,).  Agarwal et al. 2024, eq.
    2.
    """
    num_predicted_B = sequences.num_predicted
    return (1.0 / num_predicted_B.clamp_min(1)).repeat_interleave(num_predicted_B)


TOKEN_WEIGHTS: dict[str, TokenWeight] = {"uniform": uniform, "sequence_mean": sequence_mean}
