"""Who writes the tokens that the student learns on: the rollout of a recipe.

`rollouts/build.py` builds it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.options import TakesOptions
from llmdistill.recipe.sampling import SamplingRecipe, WarpRecipe
from llmdistill.recipe.schedules import ConstantShareRecipe, Share
from llmdistill.recipe.tables import Table, defaults, one_of

ACCEPT = Table("rollouts/acceptance.py", "ACCEPT")
_sampled = defaults("rollouts/sampled.py", "SampledRollout")
_interleaved = defaults("rollouts/interleaved.py", "InterleavedRollout")
_mixed = defaults("rollouts/mixed.py", "MixedRollout")
_replay = defaults("rollouts/replay.py", "ReplayRollout")


class RolloutSection(Strict):
    """What other code asks any rollout section."""

    kind: str

    @property
    def takes_data(self) -> bool:
        """Are the data set's own responses trained on?"""
        return False

    @property
    def new_tokens(self) -> int:
        """The longest response that is written."""
        return 0

    @property
    def steps_both_models(self) -> bool:
        """Do student and teacher hold a cache at the same time?"""
        return False

    @property
    def follows_the_loss(self) -> bool:
        """Does it need held-out losses?"""
        return False

    @property
    @abstractmethod
    def who_writes(self) -> str:
        """In words, for a sentence."""

    @property
    def branches(self) -> list[tuple[RolloutSection, float | None]]:
        """The ways in which a step may be written, each with its share of the steps; None if that
        adapts.
        """
        return [(self, 1.0)]


class FixedRecipe(RolloutSection):
    """Who writes: the data set."""

    kind: Literal["fixed"] = "fixed"

    @property
    def takes_data(self) -> bool:
        return True

    @property
    def who_writes(self) -> str:
        return "the data set"


class SampledRecipe(RolloutSection):
    """Who writes: one model."""

    kind: Literal["sampled"] = "sampled"
    by: Literal["student", "teacher"] = _sampled.by
    sampling: SamplingRecipe = SamplingRecipe(**_sampled.sampling)
    max_new_tokens: int = Field(_sampled.max_new_tokens, gt=0)
    samples: int = Field(_sampled.samples, gt=0)
    """Responses of the teacher to each prompt, written once; epoch e trains on response e mod
    samples.
    """

    @model_validator(mode="after")
    def _student_writes_each_time(self) -> SampledRecipe:
        if self.by == "student" and self.samples != 1:
            raise PydanticCustomError(
                "samples",
                "'samples' needs 'by: teacher', because a student writes a new response each time. "
                "Remove it.",
            )
        return self

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens

    @property
    def who_writes(self) -> str:
        return f"the {self.by}"


class ReplayRecipe(RolloutSection):
    """Who writes: the student, less and less often; else what it wrote before is taken again."""

    kind: Literal["replay"] = "replay"
    rollout: SampledRecipe = SampledRecipe()
    capacity: int = Field(_replay.capacity, gt=0)
    """Rows that are kept."""

    @model_validator(mode="after")
    def _the_student_writes(self) -> ReplayRecipe:
        if self.rollout.by == "teacher":
            raise PydanticCustomError(
                "by", "a teacher's responses are always kept and reused. Use 'by: student'."
            )
        return self

    @property
    def new_tokens(self) -> int:
        return self.rollout.new_tokens

    @property
    def who_writes(self) -> str:
        return self.rollout.who_writes


class DraftRecipe(WarpRecipe):
    """How the student draws a drafted token: SKD's settings, if not said."""

    temperature: float = Field(_interleaved.student_sampling["temperature"], ge=0)
    top_p: float = Field(_interleaved.student_sampling["top_p"], gt=0, le=1)


class ReplaceRecipe(WarpRecipe):
    """How the teacher draws what replaces it: SKD's settings, if not said."""

    temperature: float = Field(_interleaved.teacher_sampling["temperature"], ge=0)
    top_p: float = Field(_interleaved.teacher_sampling["top_p"], gt=0, le=1)


class InterleavedRecipe(RolloutSection, TakesOptions):
    """Who writes: both; the student drafts, the teacher replaces what it does not accept (SKD).

    The options of the acceptance rule stand next to it: `top_k` for top_k, `top_p` for top_p,
    `teacher_share` for mixture, `factor` and `window` for switch.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {"accept": ACCEPT}

    kind: Literal["interleaved"] = "interleaved"
    accept: one_of(ACCEPT) = _interleaved.accept  # type: ignore[valid-type]
    """Which drafted tokens stay.  top_k: the teacher's likeliest; top_p: those in its nucleus at
    temperature 1; mixture: all, but a share of the positions is the teacher's (MiniLLM); switch:
    all until the divergence jumps, then none (AdaSwitch).
    """
    block_size: Literal["auto"] | Annotated[int, Field(gt=0)] = _interleaved.block_size
    """Tokens drafted at a time; auto: as many as pay, measured while writing.  The responses do not
    depend on it.
    """
    max_new_tokens: int = Field(_interleaved.max_new_tokens, gt=0)
    student_sampling: DraftRecipe = DraftRecipe()
    teacher_sampling: ReplaceRecipe = ReplaceRecipe()
    """Of the tokens that replace what is not accepted."""

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens

    @property
    def steps_both_models(self) -> bool:
        return True

    @property
    def who_writes(self) -> str:
        return "both models"


Own = Annotated[SampledRecipe | ReplayRecipe | InterleavedRecipe, Field(discriminator="kind")]
Other = Annotated[FixedRecipe | SampledRecipe, Field(discriminator="kind")]


class MixedRecipe(RolloutSection):
    """Who writes: the student a share of the steps, another rollout the rest."""

    kind: Literal["mixed"] = "mixed"
    share: Share = ConstantShareRecipe(value=_mixed.share)
    """Probability that a step is written by `student`: a number, or a schedule."""
    student: Own = SampledRecipe()
    other: Other = FixedRecipe()

    @field_validator("share", mode="before")
    @classmethod
    def _a_number_is_a_constant(cls, given: Any) -> Any:
        is_section = isinstance(given, Mapping | Strict)
        return given if is_section else {"kind": "constant", "value": given}

    @property
    def takes_data(self) -> bool:
        return self.other.takes_data

    @property
    def new_tokens(self) -> int:
        return max(self.student.new_tokens, self.other.new_tokens)

    @property
    def steps_both_models(self) -> bool:
        return self.student.steps_both_models or self.other.steps_both_models

    @property
    def follows_the_loss(self) -> bool:
        return self.share.follows_the_loss

    @property
    def who_writes(self) -> str:
        return f"{self.student.who_writes} or {self.other.who_writes}"

    @property
    def branches(self) -> list[tuple[RolloutSection, float | None]]:
        share = self.share.mean
        return [(self.student, share), (self.other, None if share is None else 1 - share)]


RolloutRecipe = Annotated[
    FixedRecipe | SampledRecipe | InterleavedRecipe | MixedRecipe | ReplayRecipe,
    Field(discriminator="kind"),
]
