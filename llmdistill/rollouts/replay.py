"""A replay buffer: what the student wrote some time ago is trained on again.

B = sequences.

Writing is the slow part of an on-policy step.  Early in training, and until the buffer is full,
every step is written anew; then the share of steps that come out of the buffer grows with the steps
done (Ko et al. 2024, DistiLLM, section 3.2, the decreasing schedule).
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

from llmdistill.batch import Prompts, Sequences
from llmdistill.protocols import Progress, Rollout, Student, Teacher, steps_both_models
from llmdistill.sampling import Writer


class ReplayRollout:
    """`rollout` writes, and its last `capacity` rows are kept; at step k of n a full buffer is
    replayed with probability k / n.  Each rank keeps what it wrote.
    """

    def __init__(self, rollout: Rollout, *, capacity: int = 1000) -> None:
        self.rollout, self.capacity = rollout, capacity
        self.steps_both_models = steps_both_models(rollout)
        self._kept: deque[tuple[int, list[int], list[int]]] = deque(maxlen=capacity)

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        draw = random.Random(f"replay/{progress.seed}/{progress.step}")
        replays = draw.random() < progress.step / max(progress.num_steps, 1)
        if replays and len(self._kept) == self.capacity:
            rows = draw.choices(self._kept, k=len(prompts))
            row_ids, prompt_ids, responses = zip(*rows, strict=True)
            return Sequences.pack(prompt_ids, responses, row_ids, writer=Writer.STUDENT, pad_id=0)
        written = self.rollout.write(prompts, student, teacher, progress)
        own = zip(written.row_ids_B.tolist(), prompts.ids(), written.responses(), strict=True)
        self._kept.extend(own)
        return written

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [list(row) for row in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = deque(map(tuple, state["kept"]), maxlen=self.capacity)
