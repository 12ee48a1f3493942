"""The objectives of a recipe that contrast responses.  `objectives/contrastive.py` has them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmdistill.recipe.objective_base import OnSamples, WithProjectors
from llmdistill.recipe.tables import defaults

_crd = defaults("objectives/contrastive.py", "CrdObjective")
_contrastive = defaults("objectives/contrastive.py", "ContrastiveObjective")
_queued = defaults("objectives/contrastive.py", "QueuedObjective")
_icd = defaults("objectives/contrastive.py", "IcdObjective")
_rrd = defaults("objectives/contrastive.py", "RrdObjective")


class ContrastiveRecipe(OnSamples, WithProjectors):
    """Base of the sections that contrast responses.  Linear projectors of both models bring them
    into one space.
    """

    width: int = Field(_contrastive.width, gt=0)
    """Width of this space."""


class QueuedRecipe(ContrastiveRecipe):
    """Base of the sections that compare with responses of earlier batches."""

    queue_size: int = Field(_queued.queue_size, gt=0)
    """Responses of the teacher that are kept for it, the newest ones of all ranks."""


class CrdRecipe(QueuedRecipe):
    """Find the teacher's response among those of other prompts, in the batch and in earlier ones
    (CRD).
    """

    kind: Literal["crd"] = "crd"
    temperature: float = Field(_crd.temperature, gt=0)
    """Divisor of the similarities."""


class IcdRecipe(ContrastiveRecipe):
    """Find the teacher's response among those of the batch, and match in the same way from both
    sides (ICD).  A batch should have 16 rows or more.
    """

    kind: Literal["icd"] = "icd"
    invariance: float = Field(_icd.invariance, ge=0)
    """Factor on the divergence between the two ways of matching."""


class RrdRecipe(QueuedRecipe):
    """Be as similar to earlier responses as the teacher is (RRD).  Its projector of the teacher is
    random and is not trained.
    """

    kind: Literal["rrd"] = "rrd"
    student_temperature: float = Field(_rrd.student_temperature, gt=0)
    """Divisor of the student's similarities."""
    teacher_temperature: float = Field(_rrd.teacher_temperature, gt=0)
    """Divisor of the teacher's similarities.  It should be smaller than the student's."""
