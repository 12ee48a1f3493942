"""A mixed rollout: each step is written by the student's rollout or by another one.

Agarwal et al. 2024 (GKD), algorithm 1: a step is on-policy with probability `share`, called lambda
there.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from llmdistill.batch import Prompts, Sequences
from llmdistill.protocols import (
    Planned,
    Progress,
    Rollout,
    Stateful,
    Student,
    Teacher,
    WritesAhead,
)
from llmdistill.schedules import Schedule, value


class MixedRollout:
    """Two rollouts, one of which is drawn for each step.

    Args:
        student: The rollout that writes a step with probability `share`.
        other: The rollout that writes the other steps.
        share: 0 to 1: a number, or a schedule, which is a function of the progress
            (`schedules.py`).
    """

    def __init__(self, student: Rollout, other: Rollout, *, share: float | Schedule = 0.5) -> None:
        self.student, self.other, self.share = student, other, share

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        """Return the responses of the rollout that is drawn for this step."""
        return self._drawn(progress).write(prompts, student, teacher, progress)

    def _drawn(self, progress: Progress) -> Rollout:
        share = value(self.share, progress)
        # Keyed by seed and step, so that every rank and a resumed run make the same choice.
        on_policy = random.Random(f"{progress.seed}/{progress.step}").random() < share
        return self.student if on_policy else self.other

    def planned(self, progress: Progress) -> Planned | None:
        """Return what the rollout that is drawn for this step plans.

        With a share that adapts to losses, another one may be drawn when the step is made.
        """
        drawn = self._drawn(progress)
        return drawn.planned(progress) if isinstance(drawn, WritesAhead) else None

    def keep_in(self, folder: Path, teacher: Teacher, seed: int) -> None:
        """Let both rollouts keep responses that never change in a folder."""
        for part in (self.student, self.other):
            if isinstance(part, WritesAhead):
                part.keep_in(folder, teacher, seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the two rollouts, as far as they have any."""
        return {
            name: part.state_dict()
            for name, part in (("student", self.student), ("other", self.other))
            if isinstance(part, Stateful)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        for name, part in (("student", self.student), ("other", self.other)):
            if isinstance(part, Stateful):
                part.load_state_dict(state[name])
