"""A mixture: each step is written by the student or by another rollout, at a given share.

Agarwal et al. 2024 (GKD), algorithm 1: with probability `share` (lambda there) a step is on-policy.
"""

from __future__ import annotations

import random
from typing import Any

from llmdistill.batch import Prompts, Sequences
from llmdistill.protocols import (
    Progress,
    Rollout,
    Stateful,
    Student,
    Teacher,
    steps_both_models,
)
from llmdistill.schedules import Schedule, value


class MixedRollout:
    """`student` writes a step with probability `share`, `other` writes the rest.

    `share` is a number, or a schedule: a function of the progress (`schedules.py`).  The choice is
    keyed by seed and step: every rank makes the same one, and so does a resumed run.
    """

    def __init__(self, student: Rollout, other: Rollout, *, share: float | Schedule = 0.5) -> None:
        self.student, self.other, self.share = student, other, share
        self.steps_both_models = steps_both_models(student) or steps_both_models(other)

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        share = value(self.share, progress)
        on_policy = random.Random(f"{progress.seed}/{progress.step}").random() < share
        rollout = self.student if on_policy else self.other
        return rollout.write(prompts, student, teacher, progress)

    def state_dict(self) -> dict[str, Any]:
        return {
            name: part.state_dict()
            for name, part in (("student", self.student), ("other", self.other))
            if isinstance(part, Stateful)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in (("student", self.student), ("other", self.other)):
            if isinstance(part, Stateful):
                part.load_state_dict(state[name])
