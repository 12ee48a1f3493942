"""Chooses how many tokens to draft at a time, from measured costs.

A = active rows, g = block size.  A block costs g forward passes of the student over A tokens and
one pass of the teacher over A * g tokens.  With an acceptance a it adds E = (1 - a^g) / (1 - a)
tokens per row (Leviathan et al. 2023, equation 1, without the bonus token).  The size with the
least cost per token is 1 if arithmetic limits the passes, and 5 or more if memory does.
"""

from __future__ import annotations

import bisect
from collections import deque
from typing import NamedTuple

DRAFT_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
# The first blocks have these sizes, so that there are measurements to compare.  Each size comes
# twice, and the faster one counts.
TRIAL_LENGTHS = (4, 1, 8, 2) * 2
# The acceptance is a moving average: each block multiplies the older counts by this factor, so that
# the block size follows the student as it learns.
MEMORY = 0.98


class Measured(NamedTuple):
    """The measurements of one block."""

    num_rows: int
    """Active rows."""
    size: int
    """Drafted tokens of each row."""
    draft_seconds: float
    """Seconds of all passes of the student."""
    judge_seconds: float
    """Seconds of the teacher's pass and of all that follows it."""
    accepted: int
    """Kept tokens that the student wrote, over all rows."""
    kept: int
    """Kept tokens, over all rows."""


class Costs:
    """Seconds of a forward pass for each number of tokens.

    The least of the last four measurements counts, because noise only adds time.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        """Add a measurement, in seconds."""
        self._seconds.setdefault(num_tokens, deque(maxlen=4)).append(seconds)

    def __call__(self, num_tokens: int) -> float:
        """Return the seconds of a pass over `num_tokens` tokens, measured or estimated.

        Between two measured sizes the estimate is on the line through them.  Above the largest it
        is on the line through the largest two, and below the smallest it is that of the smallest.
        """
        sizes = sorted(self._seconds)
        if not sizes or num_tokens <= sizes[0] or len(sizes) == 1:
            return min(self._seconds[sizes[0]]) if sizes else 0.0
        place = min(bisect.bisect_left(sizes, num_tokens), len(sizes) - 1)
        (low, low_seconds), (high, high_seconds) = (
            (size, min(self._seconds[size])) for size in sizes[place - 1 : place + 1]
        )
        # Noise can make a larger pass look faster; the cost then counts as flat, not as falling.
        slope = max(high_seconds - low_seconds, 0.0) / (high - low)
        return low_seconds + slope * (num_tokens - low)


class AutoBlock:
    """The block size with the least cost per token, for the current rows and acceptance."""

    def __init__(self, max_new_tokens: int) -> None:
        self.draft, self.judge = Costs(), Costs()
        # Reversed, so that `pop` takes the next one.
        self._untried = [size for size in reversed(TRIAL_LENGTHS) if size <= max_new_tokens]
        self._accepted, self._kept = 0.0, 0.0

    def choose(self, num_rows: int) -> int:
        """Return the size of the next block: a trial size first, then the cheapest one."""
        if self._untried:
            return self._untried[-1]
        acceptance = self._accepted / max(self._kept, 1.0)
        draft = self.draft(num_rows)

        def cost(size: int) -> float:
            return (size * draft + self.judge(num_rows * size)) / expected(size, acceptance)

        return min(DRAFT_LENGTHS, key=cost)

    def learn(self, block: Measured) -> None:
        """Add the measurements of a block."""
        self.draft.add(block.num_rows, block.draft_seconds / block.size)
        self.judge.add(block.num_rows * block.size, block.judge_seconds)
        self._accepted = MEMORY * self._accepted + block.accepted
        self._kept = MEMORY * self._kept + block.kept
        # A block that was cut short because its rows were full does not count as a trial.
        if self._untried and self._untried[-1] == block.size:
            self._untried.pop()


def expected(size: int, acceptance: float) -> float:
    """Return the mean number of tokens that a block adds to a row.

    These are the accepted tokens and the replacement of the first refused one, at most `size`.
    """
    # The sum of the series, because its closed form is 0 / 0 at an acceptance of 1.
    return float(sum(acceptance**i for i in range(size)))
