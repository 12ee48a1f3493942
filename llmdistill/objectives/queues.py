"""A queue of vectors from earlier batches, which checkpoints contain.

S = samples of a batch, K = vectors in the queue, E = their width, P = pairs of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The newest vectors of a run, with a key of the prompt of each.  It starts empty.

    Args:
        size: The most vectors that are kept.
        pairs: Number P of pairs of layers; each has vectors of the same samples.
        width: Width E of a vector.
    """

    vectors_PKE: Tensor
    prompt_K: Tensor
    seen: Tensor

    def __init__(self, size: int, pairs: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("vectors_PKE", torch.zeros(pairs, size, width))
        self.register_buffer("prompt_K", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.seen), self.size)

    def vectors_of(self, place: int, room: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the vectors of a pair of layers, and the keys of their prompts: (K, E) and (K,).

        With `room`, only so many of the newest ones are returned.
        """
        found = min(len(self), self.size if room is None else max(room, 0))
        end = int(self.seen)
        at = torch.arange(end - found, end, device=self.prompt_K.device) % self.size
        # Copies, because the queue changes before the backward pass.
        return self.vectors_PKE[place][at], self.prompt_K[at]

    @torch.no_grad()
    def add(self, vectors: Sequence[Tensor], prompt_S: Tensor) -> None:
        """Add the vectors of a batch, (S, E) for each pair, and forget the oldest ones."""
        start, number = int(self.seen), len(prompt_S)
        newest = slice(max(number - self.size, 0), number)
        at = torch.arange(start, start + number, device=prompt_S.device)[newest] % self.size
        for kept_KE, new_SE in zip(self.vectors_PKE, vectors, strict=True):
            kept_KE[at] = new_SE.detach()[newest].to(kept_KE.dtype)
        self.prompt_K[at] = prompt_S[newest]
        self.seen += number
