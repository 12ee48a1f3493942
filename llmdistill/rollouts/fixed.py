"""The data set writes: its own responses, as they are.

B = sequences.
"""

from __future__ import annotations

from llmdistill.batch import Prompts, Sequences
from llmdistill.errors import DataError
from llmdistill.protocols import Progress, Student, Teacher
from llmdistill.sampling import Writer


class FixedRollout:
    """Supervised distillation: every prompt with the response that the data set gives it."""

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        """Raises DataError where the data set has no responses."""
        if prompts.responses is None:
            raise DataError(
                f"row {int(prompts.row_ids_B[0])} has no response, but a fixed rollout trains on "
                "the responses of the dataset. Add responses to the dataset, or set "
                "rollout.kind: sampled."
            )
        return Sequences.pack(
            prompts.ids(),
            prompts.responses,
            prompts.row_ids_B.tolist(),
            writer=Writer.DATA,
            pad_id=0,  # masked everywhere: any id does
        )
