"""Tokens as labels: which tokens are labels, and how likely a model finds them.

N = predicted tokens, n = those of one block, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmdistill.batch import Sequences
from llmdistill.distributions import Distribution
from llmdistill.objectives.divergences import log_probs
from llmdistill.sampling import Writer

BLOCK_ROWS = 8  # positions whose logits are turned into log-probabilities at a time


def labelled(sequences: Sequences) -> Tensor:
    """Return 1 at the predicted tokens that are labels, and 0 at the others: (N,).

    Tokens that the student wrote are no labels: a model learns nothing from its own samples.
    """
    return (sequences.target_writers_N != Writer.STUDENT).to(torch.float32)


def cross_entropy(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    """Return -log p(label) at each position, in nats: (n,)."""
    return -log_probs(logits_nV).gather(-1, labels_n[:, None])[:, 0]


def token_log_probs(distribution: Distribution, token_N: Tensor) -> Tensor:
    """Return the log-probability of each token under a distribution, in nats: (N,), on the CPU."""
    served, found = distribution.serve(), [torch.zeros(0)]
    for start in range(0, len(token_N), BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, len(token_N)))
        logits_nV = served[rows]
        found.append(-cross_entropy(logits_nV, token_N[rows].to(logits_nV.device)).cpu())
    return torch.cat(found)
