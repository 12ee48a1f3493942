"""A replay buffer: the student is trained again on responses that it wrote earlier.

B = sequences.

Writing is the slow part of an on-policy step.  Until the buffer is full, every step is written.
After that, the share of steps that come from the buffer grows with the number of steps done (Ko et
al. 2024, DistiLLM, section 3.2, the decreasing schedule).
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

from llmdistill.batch import Prompts, Sequences
from llmdistill.protocols import Progress, Rollout, Student, Teacher
from llmdistill.sampling import Writer


class ReplayRollout:
    """Responses of a rollout, some of them replayed from a buffer.

    At step k of n, a full buffer is replayed with probability k / n.  Replayed rows are drawn with
    replacement, together with their prompts, so a step may train on other rows than its own.  Each
    rank keeps its own buffer.

    Args:
        rollout: The rollout that writes, normally the student's.  Replayed tokens are marked as
            written by the student.
        capacity: Number of rows in a full buffer.  The oldest rows are dropped first.
    """

    def __init__(self, rollout: Rollout, *, capacity: int = 1000) -> None:
        self.rollout, self.capacity = rollout, capacity
        self._kept: deque[tuple[int, list[int], list[int]]] = deque(maxlen=capacity)

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        """Return a batch from the buffer, or let the rollout write one and keep it."""
        # Keyed by seed and step, so that every rank and a resumed run make the same choice.
        draw = random.Random(f"replay/{progress.seed}/{progress.step}")
        replays = draw.random() < progress.step / max(progress.num_steps, 1)
        if replays and len(self._kept) == self.capacity:
            rows = draw.choices(self._kept, k=len(prompts))
            row_ids, prompt_ids, responses = zip(*rows, strict=True)
            return Sequences.pack(prompt_ids, responses, row_ids, writer=Writer.STUDENT, pad_id=0)
        written = self.rollout.write(prompts, student, teacher, progress)
        # Prompts are kept too: a replayed row brings its own prompt.
        own = zip(written.row_ids_B.tolist(), prompts.ids(), written.responses(), strict=True)
        self._kept.extend(own)
        return written

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer as JSON-serialisable lists of row id, prompt ids and response ids."""
        return {"kept": [list(row) for row in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the buffer that `state_dict` returned."""
        self._kept = deque(map(tuple, state["kept"]), maxlen=self.capacity)
