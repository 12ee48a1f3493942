"""Next-token distributions of a teacher at N predicted positions, served a block at a time.

N = predicted positions, n = positions of one block, m = those of one part, K = parts, H = hidden
size, V = vocabulary.  An objective reads logits from a distribution and does not know how they are
made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmdistill.errors import TrainingError
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
        return sum((other.to(first.device) for other in others), start=first)


class Confidence(NamedTuple):
    """Weights of a combination that follow from how certain each part is at each position."""

    temperature: float = 1.0

    def __call__(self, logits: Sequence[Tensor]) -> Tensor:
        """Return softmax over the parts of -entropy / temperature: (K, n)."""
        entropy_Kn = torch.stack([_entropy(part_nV) for part_nV in logits])
        return (-entropy_Kn / self.temperature).softmax(0)


def mixture(logits: Sequence[Tensor], weights_Kn: Tensor) -> Tensor:
    """Return log sum_k w_k p_k, the logits of the weighted mean of the probabilities: (n, V)."""
    found = [
        part_nV.log_softmax(-1) + weight_n.log()[:, None]
        for part_nV, weight_n in zip(logits, weights_Kn, strict=True)
    ]
    return torch.stack(found).logsumexp(0)


def geometric(logits: Sequence[Tensor], weights_Kn: Tensor) -> Tensor:
    """Return sum_k w_k z_k, the logits of the weighted geometric mean: (n, V)."""
    pairs = zip(logits, weights_Kn, strict=True)
    first, *others = (weight_n[:, None] * part_nV for part_nV, weight_n in pairs)
    return sum(others, start=first)


Combine = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Combined:
    """Distributions over the same positions and ids, combined into one.

    `combine` makes one (n, V) of the parts' logits and their weights (K, n), such as `mixture`.
    `weights` are numbers for each position (K, N), or a function of the parts' logits.
    """

    parts: tuple[Distribution, ...]
    weights: Tensor | Confidence
    combine: Combine = mixture

    def __len__(self) -> int:
        return len(self.parts[0])

    def narrow(self, num_tokens: int) -> Combined:
        """Return the combination over the first `num_tokens` ids.

        Raises ModelError if a part has fewer ids.
        """
        return replace(self, parts=tuple(part.narrow(num_tokens) for part in self.parts))

    def select(self, places: Tensor) -> Combined:
        """Return the combination at some positions, given by index or by a mask (N,)."""
        parts = tuple(part.select(places) for part in self.parts)
        return replace(self, parts=parts, weights=_at(self.weights, places))

    def to(self, device: torch.device | str) -> Combined:
        """Return the combination with its per-position tensors on a device."""
        weights = self.weights.to(device) if isinstance(self.weights, Tensor) else self.weights
        return replace(self, parts=tuple(part.to(device) for part in self.parts), weights=weights)

    def detach(self) -> Combined:
        """Return the same numbers, cut off from the autograd graph."""
        return replace(self, parts=tuple(part.detach() for part in self.parts))

    def serve(self, chunk_size: int = CHUNK_ROWS) -> CombinedLogits:
        """Return the logits, with at most `chunk_size` positions of each part in memory."""
        served = [part.serve(chunk_size) for part in self.parts]
        return CombinedLogits(served, self.weights, self.combine)


class CombinedLogits:
    """The combination of served logits."""

    def __init__(
        self, parts: Sequence[ServedLogits], weights: Tensor | Confidence, combine: Combine
    ) -> None:
        self.parts, self.weights, self.combine = parts, weights, combine

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Tensor:
        first, *others = [_wide(part[rows]) for part in self.parts]
        logits = [first, *(other.to(first.device) for other in others)]  # experts may be elsewhere
        if isinstance(self.weights, Tensor):
            weights_Kn = self.weights[:, rows].to(first.device)
        else:
            weights_Kn = self.weights(logits)
        return self.combine(logits, weights_Kn)


@dataclass(frozen=True)
class Several:
    """Several targets: the loss is the sum of the losses against each, with weights (K, N).

    `objectives.response` takes the sum.  The targets have no common logits, so `serve` raises
    TrainingError.
    """

    parts: tuple[Distribution, ...]
    weights_KN: Tensor

    def __len__(self) -> int:
        return len(self.parts[0])

    def narrow(self, num_tokens: int) -> Several:
        """Return the targets over the first `num_tokens` ids."""
        return replace(self, parts=tuple(part.narrow(num_tokens) for part in self.parts))

    def select(self, places: Tensor) -> Several:
        """Return the targets at some positions, given by index or by a mask (N,)."""
        parts = tuple(part.select(places) for part in self.parts)
        return Several(parts, self.weights_KN[:, places.to(self.weights_KN.device)])

    def to(self, device: torch.device | str) -> Several:
        """Return the targets with their per-position tensors on a device."""
        return Several(tuple(part.to(device) for part in self.parts), self.weights_KN.to(device))

    def detach(self) -> Several:
        """Return the same numbers, cut off from the autograd graph."""
        return replace(self, parts=tuple(part.detach() for part in self.parts))

    def serve(self, chunk_size: int = CHUNK_ROWS) -> ServedLogits:
        """Raise TrainingError: there are several distributions at each position."""
        raise TrainingError(
            "the teacher gives several distributions for each token, with a weight for each, and "
            "only ResponseObjective can sum its losses against them. Use it, or let the teacher "
            "mix its distributions into one."
        )


def targets(distribution: Distribution) -> list[tuple[Tensor | None, Distribution]]:
    """Return the distributions to compare with, each with its weights (N,); None means 1."""
    if isinstance(distribution, Several):
        return list(zip(distribution.weights_KN, distribution.parts, strict=True))
    return [(None, distribution)]


@dataclass(frozen=True)
class Routed:
    """The distribution of one of K parts at each position.

    `part_N` is the index of the part.  Part k has its positions only, in their order.
    """

    parts: tuple[Distribution, ...]
    part_N: Tensor

    def __len__(self) -> int:
        return len(self.part_N)

    def narrow(self, num_tokens: int) -> Routed:
        """Return the distribution over the first `num_tokens` ids."""
        return replace(self, parts=tuple(part.narrow(num_tokens) for part in self.parts))

    def select(self, places: Tensor) -> Routed:
        """Return the distribution at some positions, given by index or by a mask (N,)."""
        places = places.to(self.part_N.device)
        place_N = self._places()[places]
        part_N = self.part_N[places]
        parts = [part.select(place_N[part_N == k]) for k, part in enumerate(self.parts)]
        return Routed(tuple(parts), part_N)

    def to(self, device: torch.device | str) -> Routed:
        """Return the distribution with its per-position tensors on a device."""
        return Routed(tuple(part.to(device) for part in self.parts), self.part_N.to(device))

    def detach(self) -> Routed:
        """Return the same numbers, cut off from the autograd graph."""
        return replace(self, parts=tuple(part.detach() for part in self.parts))

    def serve(self, chunk_size: int = CHUNK_ROWS) -> RoutedLogits:
        """Return the logits, with at most `chunk_size` positions of each part in memory."""
        served = [part.serve(chunk_size) for part in self.parts]
        return RoutedLogits(served, self.part_N, self._places())

    def _places(self) -> Tensor:
        """Return the place of each position within its part: (N,)."""
        place_N = torch.zeros_like(self.part_N)
        for k in range(len(self.parts)):
            own_N = self.part_N == k
            place_N[own_N] = torch.arange(int(own_N.sum()), device=place_N.device)
        return place_N


class RoutedLogits:
    """Served logits, each position from its own part."""

    def __init__(self, parts: Sequence[ServedLogits], part_N: Tensor, place_N: Tensor) -> None:
        # On the CPU, because each slice looks at their numbers.
        self.parts, self.part_N, self.place_N = parts, part_N.cpu(), place_N.cpu()

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Tensor:
        part_n, place_n = self.part_N[rows], self.place_N[rows]
        found = None
        for k in part_n.unique().tolist():
            own_n = part_n == k
            places = place_n[own_n]  # neighbours, because a part's positions are in order
            logits_mV = _wide(self.parts[k][slice(int(places[0]), int(places[-1]) + 1)])
            if found is None:
                found = logits_mV.new_empty(len(part_n), logits_mV.shape[1])
            found[own_n.to(found.device)] = logits_mV.to(found.device)
        assert found is not None
        return found


def _at(weights: Tensor | Confidence, places: Tensor) -> Tensor | Confidence:
    if isinstance(weights, Tensor):
        return weights[:, places.to(weights.device)]
    return weights


def _wide(logits_nV: Tensor) -> Tensor:
    """Return logits in float32, or unchanged if their dtype is wider."""
    return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))


def _entropy(logits_nV: Tensor) -> Tensor:
    """Return the entropy of each position, in nats: (n,)."""
    log_nV = logits_nV.log_softmax(-1)
    # 0 log 0 counts as 0: a masked token has a log-probability of minus infinity.
    return -(log_nV.exp() * log_nV.clamp_min(torch.finfo(log_nV.dtype).min)).sum(-1)
