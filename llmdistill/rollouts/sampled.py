"""One model writes: the student its own samples (on-policy), or the teacher its answers (SeqKD).

The student writes anew each time.  What the teacher writes never changes, so each of its `samples`
answers to a prompt is written once and kept; epoch e trains on answer e mod samples.  Ids are kept,
never decoded and tokenised again.
"""

from __future__ import annotations

from typing import Any, Literal

from llmdistill.batch import Draw, Model, Progress, Prompts, Sampling, Sequences, Teacher, Writer
from llmdistill.errors import RecipeError


class SampledRollout:
    """Answers sampled by the student or by the teacher, `max_new_tokens` at the most."""

    def __init__(
        self,
        by: Literal["student", "teacher"] = "student",
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 256,
        samples: int = 1,
    ) -> None:
        if by == "student" and samples != 1:
            raise RecipeError("rollout.samples: the student writes anew each time; leave it at 1")
        self.by = by
        self.sampling = sampling or Sampling()
        self.max_new_tokens = max_new_tokens
        self.samples = samples
        self._kept: dict[tuple[int, int], list[int]] = {}

    def write(
        self, prompts: Prompts, student: Model, teacher: Teacher, progress: Progress
    ) -> Sequences:
        if self.by == "student":
            draw = Draw(progress.seed, epoch=progress.epoch)
            return student.write(
                prompts, self.sampling, max_new_tokens=self.max_new_tokens, draw=draw
            )
        self._write_missing(prompts, teacher, progress.seed)
        row_ids = prompts.row_ids_B.tolist()
        return Sequences.pack(
            prompts.ids(),
            [self._kept[row, progress.epoch % self.samples] for row in row_ids],
            row_ids,
            writer=Writer.TEACHER,
            pad_id=0,
        )

    def _write_missing(self, prompts: Prompts, teacher: Teacher, seed: int) -> None:
        """All samples of the prompts not seen before, in one batch: a larger batch is faster."""
        places = {row: place for place, row in enumerate(prompts.row_ids_B.tolist())}
        wanted = [(row, k) for row in places for k in range(self.samples)]
        missing = [key for key in wanted if key not in self._kept]
        if not missing:
            return
        written = teacher.write(
            prompts.select([places[row] for row, _ in missing], pad_id=0),
            self.sampling,
            max_new_tokens=self.max_new_tokens,
            draw=Draw(seed, sample=tuple(k for _, k in missing)),
        )
        self._kept.update(zip(missing, written.responses(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [[*key, ids] for key, ids in self._kept.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = {(row, sample): ids for row, sample, ids in state["kept"]}
