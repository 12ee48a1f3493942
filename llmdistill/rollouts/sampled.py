"""A rollout that one model writes: the student (on-policy) or the teacher (SeqKD).

B = sequences.

The student writes new responses each time, and so does a teacher that changes.  A teacher that
stays the same writes each of its `samples` responses to a prompt once.  Epoch e trains on response
e mod samples.  A trainer lets it write them before the first step, and keeps them in files
(`training/ahead.py`).  Token ids are kept and never decoded and tokenised again, because the result
could be other tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState

from llmdistill.batch import Prompts, Sequences
from llmdistill.errors import RecipeError
from llmdistill.protocols import Planned, Progress, Student, Teacher, Writes, changes
from llmdistill.rollouts.kept import KeptResponses, identity, response_key
from llmdistill.rollouts.parts import in_parts, most_of_all
from llmdistill.sampling import Draw, Sampling, Writer


class SampledRollout:
    """Responses that the student or the teacher samples.

    Args:
        by: "student" writes new responses at each step (on-policy).  "teacher" writes its responses
            once and keeps them (SeqKD), or at each step if it changes.
        sampling: How tokens are drawn.
        max_new_tokens: The longest response, in tokens.
        samples: Number of responses of the teacher to each prompt, which the epochs take in turn.
            It must be 1 for the student.
        batch_size: The most rows that are written at once; "auto" lets memory decide.

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
        batch_size: int | Literal["auto"] = "auto",
    ) -> None:
        if by == "student" and samples != 1:
            raise RecipeError(
                f"rollout.samples should be 1 with by: student, got {samples}. The student writes "
                "a new response each time. Drop 'samples', or set rollout.by: teacher."
            )
        if batch_size != "auto" and batch_size < 1:
            raise RecipeError(f"rollout.batch_size should be 1 or more, got {batch_size}")
        self.by = by
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.samples = samples
        self.batch_size = batch_size
        self.kept = KeptResponses()
        self._all_there = False  # whether every response of the run is among the kept ones

    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        """Return responses of the student, or new or kept ones of the teacher.

        Raises RecipeError if the teacher must write but has no `write`.
        """
        if self.by == "student" or changes(teacher):
            writer: Any = student if self.by == "student" else _writing(teacher)
            draw = Draw(progress.seed, epoch=progress.epoch)
            return self._write(writer, prompts, draw)
        sample = progress.epoch % self.samples
        samples = [sample] * len(prompts)
        self.write_missing(prompts, samples, teacher, progress.seed)
        if not self._all_there:
            self.share()
        return Sequences.pack(
            prompts.ids(),
            self.kept.responses(_keys(prompts, samples)),
            prompts.row_ids_B.tolist(),
            writer=Writer.TEACHER,
            pad_id=0,
        )

    def planned(self, progress: Progress) -> Planned | None:
        """Return the responses that a step will use and that never change, or None."""
        if self.by == "student":
            return None
        return Planned(self, progress.epoch % self.samples)

    def keep_in(self, folder: Path, teacher: Teacher, seed: int) -> None:
        """Keep the teacher's responses in a subfolder from now on, and read those in it."""
        if self.by == "student" or changes(teacher):
            return
        about = {
            "teacher": getattr(teacher, "name", type(teacher).__name__),
            "identity": identity(teacher),
            "sampling": asdict(self.sampling),
            "max_new_tokens": self.max_new_tokens,
            "seed": seed,
        }
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        self.kept, self._all_there = KeptResponses(folder / name, about), False
        self.kept.refresh()

    def missing(self, prompts: Prompts, samples: Sequence[int]) -> list[int]:
        """Return the rows whose response of this number has not been written."""
        return self.kept.missing(_keys(prompts, samples)).tolist()

    def write_missing(
        self, prompts: Prompts, samples: Sequence[int], teacher: Teacher, seed: int
    ) -> None:
        """Let the teacher write and keep those responses that are not kept yet.

        `samples` has the number of the response to each prompt.
        """
        keys_B = _keys(prompts, samples)
        places = self.kept.missing(keys_B).tolist()
        if most_of_all(len(places), teacher) == 0:
            return
        asked = places or [0]  # other ranks write, and this one makes the same passes
        some = tuple(samples[place] for place in asked)
        draw = Draw(seed, sample=some if len(set(some)) > 1 else some[0])
        written = self._write(_writing(teacher), prompts.select(asked, pad_id=0), draw)
        if places:
            self.kept.add(keys_B[places], written.responses())

    def share(self, *, all_there: bool = False) -> None:
        """Read what other ranks have written.  All ranks must call it together.

        With `all_there`, it need not be called again.
        """
        if PartialState().num_processes > 1:
            PartialState().wait_for_everyone()
            self.kept.refresh()
        self._all_there = all_there

    def _write(self, writer: Writes, prompts: Prompts, draw: Draw) -> Sequences:
        def write(some: Prompts, draw: Draw) -> Sequences:
            new = self.max_new_tokens
            return writer.write(some, self.sampling, max_new_tokens=new, draw=draw)

        if self.sampling.continuous:  # it forms batches itself
            return write(prompts, draw)
        return in_parts(
            prompts,
            draw,
            write,
            new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            writers=(writer,),
        )


def _writing(teacher: Teacher) -> Writes:
    if not isinstance(teacher, Writes):
        raise RecipeError(
            f"rollout.by is 'teacher', but a {type(teacher).__name__} cannot write. Set "
            "rollout.by: student, or use a teacher of kind local."
        )
    return teacher


def _keys(prompts: Prompts, samples: Sequence[int]) -> np.ndarray:
    rows = zip(prompts.row_ids_B.tolist(), samples, prompts.ids(), strict=True)
    return np.array([response_key(*row) for row in rows], np.uint64)
