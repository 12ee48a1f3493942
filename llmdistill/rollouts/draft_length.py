"""How many tokens to draft before they are judged: measured, not guessed.

A = active rows, g = block size.  A block costs g passes of the student over A tokens and one of the
teacher over A * g; with acceptance a it brings E = (1 - a^g) / (1 - a) tokens a row (Leviathan et
al. 2023, equation 1, without the bonus token).  The size of least cost per token is 1 where passes
are bound by arithmetic and 5 or more where they are bound by memory.
"""

from __future__ import annotations

import bisect
from collections import deque
from typing import NamedTuple

DRAFT_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
TRIAL_LENGTHS = (4, 1, 8, 2) * 2  # of the first blocks, so that there is something to compare
MEMORY = 0.98  # weight of what was known of the acceptance when a block is added


class Measured(NamedTuple):
    """What a block took: seconds to draft it and to judge it; of its `kept` tokens `accepted` are
    the student's.
    """

    num_rows: int
    size: int
    draft_seconds: float
    judge_seconds: float
    accepted: int
    kept: int


class Costs:
    """Seconds of one pass by its number of tokens: the least of the last few measured."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        self._seconds.setdefault(num_tokens, deque(maxlen=4)).append(seconds)

    def __call__(self, num_tokens: int) -> float:
        """On the line through the measured sizes on either side, or through the largest two; below
        all of them the smallest.
        """
        sizes = sorted(self._seconds)
        if not sizes or num_tokens <= sizes[0] or len(sizes) == 1:
            return min(self._seconds[sizes[0]]) if sizes else 0.0
        place = min(bisect.bisect_left(sizes, num_tokens), len(sizes) - 1)
        (low, low_seconds), (high, high_seconds) = (
            (size, min(self._seconds[size])) for size in sizes[place - 1 : place + 1]
        )
        slope = max(high_seconds - low_seconds, 0.0) / (high - low)
        return low_seconds + slope * (num_tokens - low)


class AutoBlock:
    """The block size of least measured cost per token, for the rows and the acceptance of now."""

    def __init__(self, max_new_tokens: int) -> None:
        self.draft, self.judge = Costs(), Costs()
        self._untried = [size for size in reversed(TRIAL_LENGTHS) if size <= max_new_tokens]
        self._accepted, self._kept = 0.0, 0.0

    def choose(self, num_rows: int) -> int:
        if self._untried:
            return self._untried[-1]
        acceptance = self._accepted / max(self._kept, 1.0)
        draft = self.draft(num_rows)

        def cost(size: int) -> float:
            return (size * draft + self.judge(num_rows * size)) / expected(size, acceptance)

        return min(DRAFT_LENGTHS, key=cost)

    def learn(self, block: Measured) -> None:
        self.draft.add(block.num_rows, block.draft_seconds / block.size)
        self.judge.add(block.num_rows * block.size, block.judge_seconds)
        self._accepted = MEMORY * self._accepted + block.accepted
        self._kept = MEMORY * self._kept + block.kept
        if self._untried and self._untried[-1] == block.size:
            self._untried.pop()


def expected(size: int, acceptance: float) -> float:
    """Tokens that a block brings a row: its accepted head, and the replacement where it ends."""
    return float(sum(acceptance**i for i in range(size)))
