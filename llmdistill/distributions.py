"""Next-token distributions of a teacher at N predicted positions, served a block at a time.

N = predicted positions, n = positions of one block, H = hidden size, V = vocabulary.  An objective
reads logits from a distribution and does not know how they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llmdistill.models.chunks import CHUNK_ROWS, HeadLogits
from llmdistill.models.heads import Head


class ServedLogits(Protocol):
    """Logits of a distribution, read a slice of positions at a time."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Return the logits of these positions: (n, V), without gradients.

        The tensor is on the teacher's device.  Read it before the next slice is taken, because
        both may share one buffer.
        """


class Distribution(Protocol):
    """The next-token distributions of a teacher at N predicted positions."""

    def __len__(self) -> int:
        """Return N, the number of predicted positions."""

    def narrow(self, num_tokens: int) -> Distribution:
        """Return the distributions over the first `num_tokens` ids only.

        Raises ModelError if there are fewer ids.
        """

    def select(self, places: Tensor) -> Distribution:
        """Return the distributions at some of the N positions, given by index or by a mask (N,)."""

    def to(self, device: torch.device | str) -> Distribution:
        """Return the distributions with their per-position tensors on a device."""

    def detach(self) -> Distribution:
        """Return the same numbers, cut off from the autograd graph."""

    def serve(self, chunk_size: int = CHUNK_ROWS) -> ServedLogits:
        """Return the logits in blocks, with at most `chunk_size` positions in memory at a time."""


@dataclass(frozen=True)
class Dense:
    """The distribution of a model, kept as final hidden states (N, H) and the head over them.

    Logits over the whole vocabulary exist only a chunk at a time, when they are served.
    """

    hidden_NH: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden_NH)

    def narrow(self, num_tokens: int) -> Dense:
        """Return the distribution over the first `num_tokens` ids.

        Raises ModelError if the head has fewer rows.
        """
        return replace(self, head=self.head.narrow(num_tokens))

    def select(self, places: Tensor) -> Dense:
        """Return the distribution at some positions, given by index or by a mask (N,)."""
        return replace(self, hidden_NH=self.hidden_NH[places.to(self.hidden_NH.device)])

    def to(self, device: torch.device | str) -> Dense:
        """Return the distribution with its hidden states on a device.

        The head stays on the device of its model.
        """
        return replace(self, hidden_NH=self.hidden_NH.to(device))

    def detach(self) -> Dense:
        """Return the same numbers, cut off from the autograd graph."""
        return Dense(self.hidden_NH.detach(), self.head.detach())

    def serve(self, chunk_size: int = CHUNK_ROWS) -> HeadLogits:
        """Return the logits, computed for at most `chunk_size` positions at a time."""
        return HeadLogits(self.hidden_NH, self.head, chunk_size)


@dataclass(frozen=True)
class Blend:
    """A weighted sum of the logits of several distributions: their geometric mean if the sum is 1.

    The distributions are over the same positions and ids.
    """

    parts: tuple[Distribution, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def narrow(self, num_tokens: int) -> Blend:
        """Return the blend over the first `num_tokens` ids.

        Raises ModelError if a part has fewer ids.
        """
        return replace(self, parts=tuple(part.narrow(num_tokens) for part in self.parts))

    def select(self, places: Tensor) -> Blend:
        """Return the blend at some positions, given by index or by a mask (N,)."""
        return replace(self, parts=tuple(part.select(places) for part in self.parts))

    def to(self, device: torch.device | str) -> Blend:
        """Return the blend with its per-position tensors on a device."""
        return replace(self, parts=tuple(part.to(device) for part in self.parts))

    def detach(self) -> Blend:
        """Return the same numbers, cut off from the autograd graph."""
        return replace(self, parts=tuple(part.detach() for part in self.parts))

    def serve(self, chunk_size: int = CHUNK_ROWS) -> BlendedLogits:
        """Return the logits, with at most `chunk_size` positions of each part in memory."""
        return BlendedLogits([part.serve(chunk_size) for part in self.parts], self.weights)


class BlendedLogits:
    """The weighted sum of served logits."""

    def __init__(self, parts: Sequence[ServedLogits], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, weights

    def __getitem__(self, rows: slice) -> Tensor:
        pairs = zip(self.parts, self.weights, strict=True)
        first, *others = (weight * part[rows] for part, weight in pairs)
        return sum(others, start=first)
