"""Numbers that change while training goes on: the weight of an objective, the share of a rollout.

A schedule is a function of `Progress`.  `step` counts the optimiser steps done, from 0; the last
step of a run is number `num_steps - 1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmdistill.protocols import Progress
from llmdistill.recipe.schedules import ScheduleSection, described

Schedule = Callable[[Progress], float]


def done(progress: Progress) -> float:
    """The part of the run that is done: 0 at the first step, 1 at the last."""
    return min(progress.step / max(progress.num_steps - 1, 1), 1.0)


@dataclass(frozen=True)
class Linear:
    """From `start` at the first step to `end` at the last, on a line."""

    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        return self.start + (self.end - self.start) * done(progress)


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine: slow at both ends."""

    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done(progress))) / 2


@dataclass(frozen=True)
class Exponential:
    """From `start` to `end` by the same factor at each step; both are above 0."""

    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        return self.start * (self.end / self.start) ** done(progress)


@dataclass(frozen=True)
class CriticalPeriod:
    """`start` at first, multiplied by `decay` after each of `periods` equal parts of the run.

    Forces what is matched early in training and then lets go: the critical-period weights of
    Passalis et al. 2020, section 3.3, whose periods are epochs (100, 70, 49, ...).
    """

    start: float
    decay: float = 0.7
    periods: int = 50

    def __call__(self, progress: Progress) -> float:
        period = self.periods * progress.step // max(progress.num_steps, 1)
        return self.start * self.decay ** min(period, self.periods)


@dataclass(frozen=True)
class Adaptive:
    """Rises by `rise` whenever the held-out loss has risen by `tolerance` nats or more, up to 1.

    The loss is compared with that of the last rise, at first with the first one measured: the
    student writes more as soon as the other text stops helping.  Ko et al. 2024 (DistiLLM), section
    3.2; a function of the losses so far, so a resumed run continues where it was.
    """

    start: float = 0.0
    rise: float = 0.1
    tolerance: float = 0.1

    def __call__(self, progress: Progress) -> float:
        share = self.start
        before, *losses = progress.eval_losses or (0.0,)
        for loss in losses:
            if loss >= before + self.tolerance:
                share, before = min(share + self.rise, 1.0), loss
        return share


def value(number: float | Schedule, progress: Progress) -> float:
    """A number as it is, or what a schedule says now."""
    return number(progress) if callable(number) else number


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "critical_period": CriticalPeriod,
    "adaptive": Adaptive,
}


def build_schedule(section: ScheduleSection | float) -> float | Schedule:
    """The number or the schedule that a recipe asks for."""
    kind, fields = described(section)
    return fields["value"] if kind == "constant" else SCHEDULES[kind](**fields)
