"""How tokens are drawn, and who draws them."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Writer(enum.IntEnum):
    """Who wrote a token."""

    DATA = 0
    TEACHER = 1
    STUDENT = 2


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy, top_k 0 and top_p 1 keep every token.

    With `continuous` rows join and leave the batch while it is written (transformers'
    `generate_batch`): made for GPUs.  An answer then also depends on the other rows.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    continuous: bool = False


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Draw:
    """Which random draw this is; with row, slot and writer it keys every sampled token.

    `sample` counts the answers to one prompt (one number, or one a row), `epoch` the passes over
    the data.
    """

    seed: int
    epoch: int = 0
    sample: int | tuple[int, ...] = 0
