"""Filter tasks, and count what happens to them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmdistill.instruct.filters import Duplicates, EmptyAnswer, Filter
from llmdistill.instruct.tasks import Task

logger = logging.getLogger("llmdistill")


@dataclass
class TaskCounts:
    """Number of tasks that were kept, and dropped by reason.

    `variants` counts the kept ones by the variant of the generator that made them, `thought` those
    with thinking, `copies` those that equal another one, and `unscored` those without a score that
    a judge was asked for.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    variants: Counter[str] = field(default_factory=Counter)
    thought: int = 0
    copies: int = 0
    unscored: int = 0

    @property
    def made(self) -> int:
        """Number of tasks so far, kept and dropped."""
        return self.kept + sum(self.dropped.values())


class Sieve:
    """Applies filters in order.  It warns once about each that drops most tasks of a round."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self.filters = (EmptyAnswer(), *filters)  # such a row is of no use in any dataset
        self.counts = TaskCounts()
        self._copies = Duplicates()
        self._dropped: Counter[str] = Counter()  # of this round, by the filter's name
        self._warned: set[str] = set()

    def passes(self, task: Task) -> bool:
        """Whether all filters keep all turns of the task; a dropped one is counted."""
        # Evaluated lazily: the first reason ends the search, so cheap filters should come first.
        reasons = (
            (reason, one.kind)
            for one in self.filters
            if task.is_answered or not one.needs_answer
            for turn in task.each_turn()
            if (reason := one.reason(turn)) is not None
        )
        if found := next(reasons, None):
            reason, kind = found
            self.counts.dropped[reason] += 1
            self._dropped[kind] += bool(kind)
        return found is None

    def keep(self, task: Task) -> dict[str, Any]:
        """Count a kept task, and return the columns that the filters add to its row."""
        columns: dict[str, Any] = {}
        for one in self.filters:
            columns |= one.columns(task)
        self.counts.copies += self._copies.reason(task) is not None
        for one in (*self.filters, self._copies):
            for turn in task.each_turn():
                one.kept(turn)
        self.counts.kept += 1
        self.counts.unscored += None in task.scores.values()
        self.counts.thought += bool(task.thinking)
        self.counts.variants.update([task.variant] if task.variant else [])
        return columns

    def end_round(self, tasks: int) -> None:
        """Look at the drops of a round with this many tasks."""
        for kind, dropped in self._dropped.items():
            if dropped > tasks / 2 and kind not in self._warned:
                self._warned.add(kind)
                logger.warning(
                    "the filter '%s' dropped %d of %d tasks of a round. Change its options in "
                    "'filters', or leave it out there.", kind, dropped, tasks,
                )  # fmt: skip
        self._dropped.clear()
