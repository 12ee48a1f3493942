"""A rollout that returns the dataset's own responses.

B = sequences.
"""

from __future__ import annotations

from llmdistill.batch import Prompts, Sequences
from llmdistill.errors import DataError
from llmdistill.protocols import Progress, Student, Teacher
from llmdistill.sampling import Writer


class FixedRollout:
    """The dataset's own responses: supervised distillation.

    It has no parameters.  Every prompt gets the response that its row has in the dataset.
    """

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        """Return the prompts with the responses of the dataset.

        Raises DataError if the dataset has no responses.
        """
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
            pad_id=0,  # Every mask leaves padding out, so any id works.
        )
