"""Who takes part in a step, and what each part is told of the run."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.sampling import Draw, Sampling


class Need(enum.Enum):
    """What an objective asks of a teacher."""

    DISTRIBUTION = "next-token distributions"


@dataclass(frozen=True)
class Progress:
    """Where training stands when a batch is written: steps done of how many, passes over the data,
    and the held-out losses measured so far.
    """

    step: int
    epoch: int
    seed: int
    num_steps: int = 0
    eval_losses: tuple[float, ...] = ()


class Student(Protocol):
    """Who can write: a teacher, or the student inside its wrapper."""

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences: ...


class Teacher(Student, Protocol):
    """Who judges.  `provides` is what it can be asked for; `judge` is called once for each
    micro-batch.
    """

    provides: frozenset[Need]

    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal: ...


class Rollout(Protocol):
    """Who writes the tokens that the student learns on."""

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences: ...


@runtime_checkable
class Stateful(Protocol):
    """A rollout whose memory belongs into a checkpoint, as plain JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
