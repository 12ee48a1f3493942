"""One model writes: the student its own samples (on-policy), or the teacher its answers (SeqKD).

B = sequences.

The student writes anew each time.  What the teacher writes never changes, so each of its `samples`
answers to a prompt is written once, when its turn comes, and kept; epoch e trains on answer e mod
samples.  Ids are kept, never decoded and tokenised again.
"""

from __future__ import annotations

from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import gather_object

from llmdistill.batch import Prompts, Sequences
from llmdistill.errors import RecipeError
from llmdistill.protocols import Progress, Student, Teacher, Writes
from llmdistill.sampling import Draw, Sampling, Writer

Kept = tuple[tuple[int, int], list[int]]  # (row, sample), ids


class SampledRollout:
    """Answers sampled by the student or by the teacher, `max_new_tokens` at the most."""

    def __init__(
        self,
        by: Literal["student", "teacher"] = "student",
        *,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        samples: int = 1,
    ) -> None:
        if by == "student" and samples != 1:
            raise RecipeError(
                f"rollout.samples should be 1 with by: student, got {samples}. The student writes "
                "a new response each time. Drop 'samples', or set rollout.by: teacher."
            )
        self.by = by
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.samples = samples
        self._kept: dict[tuple[int, int], list[int]] = {}

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        if self.by == "student":
            draw = Draw(progress.seed, epoch=progress.epoch)
            return student.write(
                prompts, self.sampling, max_new_tokens=self.max_new_tokens, draw=draw
            )
        sample = progress.epoch % self.samples
        keys = [(row, sample) for row in prompts.row_ids_B.tolist()]
        missing = {key: place for place, key in enumerate(keys) if key not in self._kept}
        written, new = None, []
        if missing:
            if not isinstance(teacher, Writes):
                raise RecipeError(
                    f"rollout.by is 'teacher', but a {type(teacher).__name__} cannot write. Set "
                    "rollout.by: student, or use a teacher of kind local."
                )
            written = teacher.write(
                prompts.select(list(missing.values()), pad_id=0),
                self.sampling,
                max_new_tokens=self.max_new_tokens,
                draw=Draw(progress.seed, sample=sample),
            )
            new = list(zip(missing, written.responses(), strict=True))
        self._kept.update(_of_all_ranks(new))
        if written is not None and len(missing) == len(keys):
            return written  # with its judgement
        return Sequences.pack(
            prompts.ids(),
            [self._kept[key] for key in keys],
            prompts.row_ids_B.tolist(),
            writer=Writer.TEACHER,
            pad_id=0,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [[*key, ids] for key, ids in self._kept.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = {(row, sample): ids for row, sample, ids in state["kept"]}


def _of_all_ranks(new: list[Kept]) -> list[Kept]:
    """What every rank has just written: in the next epoch a row may come to another rank."""
    return gather_object(new) if PartialState().num_processes > 1 else new
