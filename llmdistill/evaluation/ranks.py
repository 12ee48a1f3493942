"""Sharing the rows of an evaluation between ranks.  With one process, every function is trivial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

T = TypeVar("T")


def own_rows(number: int, *, alike: bool = False) -> list[int]:
    """Return the rows of this rank, of `number` rows; all of them if the ranks work `alike`."""
    state = PartialState()
    if alike:
        return list(range(number))
    return list(range(state.process_index, number, state.num_processes))


def of_all_rows(own: Sequence[T], number: int, *, alike: bool = False) -> list[T]:
    """Return what all ranks have for their rows, in the order of the rows."""
    state = PartialState()
    if state.num_processes == 1 or alike:
        return list(own)
    # Rank r has rows r, r + n, r + 2n, ...
    parts = gather_object([list(own)])
    return [parts[row % state.num_processes][row // state.num_processes] for row in range(number)]


def summed(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, in float64."""
    if PartialState().num_processes == 1:
        return values.double()
    parts = gather_object([values.double().cpu()])
    return torch.stack(parts).sum(0)


def from_first(value: T) -> T:
    """Return the value that the first rank has."""
    return broadcast_object_list([value])[0]
