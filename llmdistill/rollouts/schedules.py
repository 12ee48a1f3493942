"""How large the student's share of a mixture is, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmdistill.protocols import Progress

Share = Callable[[Progress], float]


@dataclass(frozen=True)
class LinearShare:
    """From `start` at the first step to `end` at the last."""

    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        done = min(progress.step / max(progress.num_steps - 1, 1), 1.0)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class AdaptiveShare:
    """Rises by `rise` whenever the held-out loss has risen by `tolerance` nats or more.

    The loss is compared with that of the last rise, at first with the first one measured: the
    student writes more as soon as the other text stops helping.  Ko et al. 2024 (DistiLLM), section
    3.2; a function of the losses so far, so a resumed run goes on where it was.
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
