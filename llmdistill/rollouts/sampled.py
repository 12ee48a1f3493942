"""A rollout that one model writes: the student (on-policy) or the teacher (SeqKD).

B = sequences.

The student writes new responses each time.  The teacher does not change, so each of its `samples`
responses to a prompt is written once, in the epoch that first needs it, and kept.  Epoch e trains
on response e mod samples.  Token ids are kept and never decoded and tokenised again, because the
result could be other tokens.
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
    """Responses that the student or the teacher samples.

    Args:
        by: "student" writes new responses at each step (on-policy).  "teacher" writes its responses
            once and keeps them (SeqKD).
        sampling: How tokens are drawn.
        max_new_tokens: The longest response, in tokens.
        samples: Number of responses of the teacher to each prompt, which the epochs take in turn.
            It must be 1 for the student.

    Raises:
        RecipeError: If `samples` is not 1 for the student.
    """

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
        """Return responses of the student, or new or kept ones of the teacher.

        Raises RecipeError if the teacher must write but has no `write`.
        """
        if self.by == "student":
            draw = Draw(progress.seed, epoch=progress.epoch)
            return student.write(
                prompts, self.sampling, max_new_tokens=self.max_new_tokens, draw=draw
            )
        sample = progress.epoch % self.samples
        keys = [(row, sample) for row in prompts.row_ids_B.tolist()]
        # A dict, so that a row that is twice in the batch (a filler row) is written once.
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
        # Every rank must call this, even one that wrote nothing: it is a collective operation.
        self._kept.update(_of_all_ranks(new))
        if written is not None and len(missing) == len(keys):
            return written  # It has the teacher's signal, so the teacher does not run again.
        return Sequences.pack(
            prompts.ids(),
            [self._kept[key] for key in keys],
            prompts.row_ids_B.tolist(),
            writer=Writer.TEACHER,
            pad_id=0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's kept responses, as JSON-serialisable [row, sample, ids]."""
        return {"kept": [[*key, ids] for key, ids in self._kept.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the responses that `state_dict` returned."""
        self._kept = {(row, sample): ids for row, sample, ids in state["kept"]}


def _of_all_ranks(new: list[Kept]) -> list[Kept]:
    """Return the responses that all ranks have just written.

    In the next epoch, a row may go to another rank, which must not write it again.
    """
    return gather_object(new) if PartialState().num_processes > 1 else new
