"""Schedules: numbers that change during training, such as the weight of an objective.

A schedule is a function of `Progress`.  `step` counts the optimizer steps that are done, from 0, so
the last step of a run is number `num_steps - 1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmdistill.protocols import Progress
from llmdistill.recipe.schedules import ScheduleSection, described

Schedule = Callable[[Progress], float]


def done(progress: Progress) -> float:
    """Return the share of the run that is done: 0 at the first step, 1 at the last."""
    # The divisor is one less than the number of steps, so that a schedule reaches its end.
    return min(progress.step / max(progress.num_steps - 1, 1), 1.0)


@dataclass(frozen=True)
class Linear:
    """Change by the same amount at each step, from `start` to `end`.

    value = start + (end - start) * t, with t from 0 at the first step to 1 at the last.  `start`
    and `end` are 0 or more for the weight of an objective, and 0 to 1 for a share.
    """

    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        return self.start + (self.end - self.start) * done(progress)


@dataclass(frozen=True)
class Cosine:
    """Change along half a cosine from `start` to `end`, slowly at both ends.

    value = end + (start - end) * (1 + cos(pi * t)) / 2, with t from 0 at the first step to 1 at the
    last.  `start` and `end` are 0 or more for the weight of an objective, and 0 to 1 for a share.
    """

    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done(progress))) / 2


@dataclass(frozen=True)
class Exponential:
    """Change by the same factor at each step, from `start` to `end`.

    value = start * (end / start)^t, with t from 0 at the first step to 1 at the last.  `start` and
    `end` must be above 0.
    """

    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        return self.start * (self.end / self.start) ** done(progress)


@dataclass(frozen=True)
class CriticalPeriod:
    """Begin at `start` and multiply by `decay` after each of `periods` equal parts of the run.

    value = start * decay^k, with k the number of parts that are complete.  The weight is large
    early in training and then fades: the critical-period weights of Passalis et al. 2020,
    section 3.3.  There a period is an epoch, and the weights are 100, 70, 49, ...

    `start` is the weight in the first part, 0 or more.  `decay` is the factor after each part,
    above 0 and at most 1.  `periods` is the number of parts, 1 or more.
    """

    start: float
    decay: float = 0.7
    periods: int = 50

    def __call__(self, progress: Progress) -> float:
        period = self.periods * progress.step // max(progress.num_steps, 1)
        return self.start * self.decay ** min(period, self.periods)


@dataclass(frozen=True)
class Adaptive:
    """Rise by `rise`, up to 1, each time the held-out loss has risen by at least `tolerance`.

    As the share of a mixed rollout, it lets the student write more once the other responses no
    longer help.  Each loss is compared with the loss at the last rise of the share, and before that
    with the first loss that was measured.  Ko et al. 2024 (DistiLLM), section 3.2.

    `start` is the share before the first rise, 0 to 1.  `rise` is added at each rise, above 0 and
    at most 1.  `tolerance` is in the units of the held-out loss (nats), 0 or more.
    """

    start: float = 0.0
    rise: float = 0.1
    tolerance: float = 0.1

    def __call__(self, progress: Progress) -> float:
        # Computed from all losses so far, without state, so that a resumed run continues the same.
        share = self.start
        before, *losses = progress.eval_losses or (0.0,)
        for loss in losses:
            if loss >= before + self.tolerance:
                share, before = min(share + self.rise, 1.0), loss
        return share


def value(number: float | Schedule, progress: Progress) -> float:
    """Return the current value of a schedule; a plain number is returned unchanged."""
    return number(progress) if callable(number) else number


# The names that recipes use; `recipe/schedules.py` has a section for each.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "critical_period": CriticalPeriod,
    "adaptive": Adaptive,
}


def build_schedule(section: ScheduleSection | float) -> float | Schedule:
    """Return the number or the schedule that a section of a recipe describes."""
    kind, fields = described(section)
    return fields["value"] if kind == "constant" else SCHEDULES[kind](**fields)
