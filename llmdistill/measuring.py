"""What a run measures: the student before and after training, and its teacher.

All ranks measure together.  Figures before training are written at once, so that a resumed run has
them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.render import last_messages
from llmdistill.evaluation.measure import Evaluation, Figures, Measurement
from llmdistill.evaluation.results import Answers, read_results, write_results
from llmdistill.models.build import rounded
from llmdistill.models.load import load_model
from llmdistill.protocols import Teacher
from llmdistill.recipe import Recipe
from llmdistill.run_folder import BEFORE, POSITIONS, write_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("llmdistill")

LOOKED_AT = 4  # held-out responses whose positions are kept for the report


@dataclass(frozen=True)
class Result:
    """The results of a run.

    `evaluation` has the figures of `before`, `after` and `teacher`.  It is empty without held-out
    rows.
    """

    folder: Path
    evaluation: Mapping[str, Figures] = field(default_factory=dict)
    answers: list[Answers] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Return the figures and the responses of a run that is finished."""
        return cls(folder, *read_results(folder))

    @property
    def student(self) -> Path:
        return self.folder / "student"


def measuring_of(
    recipe: Recipe,
    teacher: Teacher,
    held: PromptDataset | None,
    folder: Path,
    exported: torch.dtype | None,
) -> Measuring:
    """Let the teacher answer the held-out prompts of a run, if it has any."""
    if held is None:
        return Measuring(None, folder, exported)
    logger.info("the teacher answers %d held-out prompts", len(held))
    evaluation = Evaluation(
        teacher,
        collate(held.rows),
        max_new_tokens=recipe.evaluate.max_new_tokens,
        seed=recipe.seed,
        answer_pattern=recipe.evaluate.answer_pattern,
    )
    return Measuring(evaluation, folder, exported)


class Measuring:
    """The measurements of one run.  Nothing is measured without an evaluation.

    `exported` is the dtype in which the student is exported; None is its own.
    """

    def __init__(
        self, evaluation: Evaluation | None, folder: Path, exported: torch.dtype | None
    ) -> None:
        self.evaluation, self.folder, self.exported = evaluation, folder, exported
        self._before: Measurement | None = None

    def teacher_text(self) -> PromptDataset | None:
        """Return the held-out rows with the teacher's responses."""
        return None if self.evaluation is None else self.evaluation.teacher_text()

    def before(self, student: PreTrainedModel, *, resumed: bool) -> None:
        """Measure the student before training, unless the run that is resumed has done so."""
        if self.evaluation is None:
            return
        self._before = self._kept(self.evaluation) if resumed else None
        if self._before is None:
            logger.info("measuring the student before training")
            model = rounded(student, self.exported, self.evaluation.measured_dtype())
            self._before = self.evaluation.measure(model, self.exported)

    def keep(self) -> None:
        """Write what was measured before training into the run folder, on the first rank."""
        if self.evaluation is None or self._before is None or not PartialState().is_main_process:
            return
        figures, responses = self._before
        record = {"of": self.evaluation.digest(), "figures": asdict(figures)}
        text = json.dumps(record | {"responses": responses}, indent=2)
        (self.folder / BEFORE).write_text(text + "\n", encoding="utf-8")

    def _kept(self, evaluation: Evaluation) -> Measurement | None:
        """Return what an earlier start has measured, if it did so in the same way."""
        try:
            found = json.loads((self.folder / BEFORE).read_text(encoding="utf-8"))
            same = found["of"] == evaluation.digest()
            kept = Measurement(Figures(**found["figures"]), found["responses"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):  # of an earlier version, or damaged
            kept = None
        # All ranks must do the same.
        return kept if all(gather_object([kept is not None])) else None

    def after(self) -> Result:
        """Measure the exported student on all ranks, and write the figures on the first."""
        student = self.folder / "student"
        if self.evaluation is None:
            return Result(self.folder)
        if not all(gather_object([student.is_dir()])):
            logger.warning("the student is not measured: not all machines see %s", student)
            return Result(self.folder)
        logger.info("measuring the student after training")
        used = str(self.evaluation.measured_dtype()).removeprefix("torch.")
        model = load_model(str(student), dtype=used, device=self.evaluation.device)
        looked_at = self.evaluation.looked_at(model, LOOKED_AT)
        if PartialState().is_main_process:
            rows = [
                {"prompt": prompt, "positions": [*map(asdict, row)]} for prompt, row in looked_at
            ]
            write_lines(self.folder / POSITIONS, rows)
        return self._written(self.evaluation, self.evaluation.measure(model, self.exported))

    def _written(self, evaluation: Evaluation, after: Measurement) -> Result:
        """Write evaluation.json, and return the figures and the responses side by side."""
        assert self._before is not None
        figures = {"before": self._before.figures, "after": after.figures}
        figures |= evaluation.teacher_figures()
        prompts = last_messages(evaluation.teacher.tokenizer, evaluation.prompts.ids())
        texts = (evaluation.reference.texts, self._before.responses, after.responses)
        answers = [Answers(*row) for row in zip(prompts, *texts, strict=True)]
        if PartialState().is_main_process:
            write_results(self.folder, figures, answers)
        return Result(self.folder, figures, answers)
