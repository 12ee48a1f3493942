"""Next-token distributions of a teacher at N predicted positions, served a block at a time.

N = predicted positions, n = positions of one block, H = hidden size, V = vocabulary.  An objective
asks a distribution for logits and does not know how they are made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llmdistill.models.chunks import CHUNK_ROWS, HeadLogits
from llmdistill.models.heads import Head


class ServedLogits(Protocol):
    """`served[rows]` are the logits of these positions: (n, V), without gradients, on the
    teacher's device, valid until other rows are asked for.
    """

    def __getitem__(self, rows: slice) -> Tensor: ...


class Distribution(Protocol):
    """What a teacher's next-token distributions can be asked for."""

    def __len__(self) -> int:
        """N, the number of predicted positions."""

    def narrow(self, num_tokens: int) -> Distribution:
        """Over the first `num_tokens` ids only; ModelError if there are fewer."""

    def select(self, places: Tensor) -> Distribution:
        """At some of the N positions: by number, or by a mask (N,)."""

    def to(self, device: torch.device | str) -> Distribution:
        """With what is kept per position on this device."""

    def detach(self) -> Distribution:
        """The same numbers without a way back for gradients."""

    def serve(self, chunk_size: int = CHUNK_ROWS) -> ServedLogits:
        """The logits in blocks; at most `chunk_size` positions are held at a time."""


@dataclass(frozen=True)
class Dense:
    """All logits of a model: its final hidden states and the head over them."""

    hidden_NH: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden_NH)

    def narrow(self, num_tokens: int) -> Dense:
        return replace(self, head=self.head.narrow(num_tokens))

    def select(self, places: Tensor) -> Dense:
        return replace(self, hidden_NH=self.hidden_NH[places.to(self.hidden_NH.device)])

    def to(self, device: torch.device | str) -> Dense:
        """The head stays where its model is."""
        return replace(self, hidden_NH=self.hidden_NH.to(device))

    def detach(self) -> Dense:
        return Dense(self.hidden_NH.detach(), self.head.detach())

    def serve(self, chunk_size: int = CHUNK_ROWS) -> HeadLogits:
        return HeadLogits(self.hidden_NH, self.head, chunk_size)
