"""The rollout of a recipe: it writes the tokens that the student learns on.

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
    """Base of all rollout sections: the properties that other code may use."""

    kind: str

    @property
    def takes_data(self) -> bool:
        """Whether the dataset's own responses are trained on."""
        return False

    @property
    def new_tokens(self) -> int:
        """Length of the longest response that is written, in tokens; 0 if nothing is written."""
        return 0

    @property
    def most_rows(self) -> int | None:
        """Number of rows that the recipe lets a model write at once; None leaves it to memory."""
        size = getattr(self, "batch_size", "auto")
        return None if size == "auto" else int(size)

    @property
    def steps_both_models(self) -> bool:
        """Whether student and teacher each keep a cache at the same time."""
        return False

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher writes whole responses."""
        return False

    @property
    def has_labels(self) -> bool:
        """Whether some tokens are written by another writer than the student."""
        return True

    @property
    def follows_the_loss(self) -> bool:
        """Whether the rollout needs held-out losses."""
        return False

    @property
    @abstractmethod
    def who_writes(self) -> str:
        """The writer in words, for a sentence."""

    @property
    def branches(self) -> list[tuple[RolloutSection, float | None]]:
        """Rollouts that can write a step, each with its share of the steps; None if it adapts."""
        return [(self, 1.0)]


class FixedRecipe(RolloutSection):
    """Train on the responses of the dataset.  Every row needs one."""

    kind: Literal["fixed"] = "fixed"

    @property
    def takes_data(self) -> bool:
        return True

    @property
    def who_writes(self) -> str:
        return "the dataset"


class SampledRecipe(RolloutSection):
    """Train on responses that one model samples: the student (on-policy distillation) or the
    teacher (sequence-level distillation, SeqKD).  Responses in the dataset are ignored.
    """

    kind: Literal["sampled"] = "sampled"
    by: Literal["student", "teacher"] = _sampled.by
    """Model that writes.  `student` writes new responses at every step.  `teacher` writes each
    response once, and later epochs reuse it.
    """
    sampling: SamplingRecipe = SamplingRecipe(**_sampled.sampling)
    """How tokens are sampled."""
    max_new_tokens: int = Field(_sampled.max_new_tokens, gt=0)
    """Length at which a response is cut off, in tokens."""
    samples: int = Field(_sampled.samples, gt=0)
    """Number of responses that the teacher writes to each prompt.  Epochs take turns with them:
    epoch `e` trains on response `e` modulo `samples`.  It needs `by: teacher`.
    """

    batch_size: Literal["auto"] | Annotated[int, Field(gt=0)] = _sampled.batch_size
    """Number of rows that are written at once, at most.  `auto` takes as many as the device writes
    well and its free memory holds.  It changes the responses only through rounding.
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
    def teacher_writes(self) -> bool:
        return self.by == "teacher"

    @property
    def has_labels(self) -> bool:
        return self.by == "teacher"

    @property
    def who_writes(self) -> str:
        return f"the {self.by}"


class ReplayRecipe(RolloutSection):
    """Train on responses of the student, and on a growing share of steps on earlier ones again
    (DistiLLM).  Replayed steps are faster, because nothing is written.
    """

    kind: Literal["replay"] = "replay"
    rollout: SampledRecipe = SampledRecipe()
    """Rollout that writes new responses, of kind `sampled` and by the student."""
    capacity: int = Field(_replay.capacity, gt=0)
    """Number of the newest rows that each process keeps.  Nothing is replayed before the buffer is
    full.
    """

    # A buffer in front of the teacher would replay what SampledRollout already keeps.
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
    def most_rows(self) -> int | None:
        return self.rollout.most_rows

    @property
    def has_labels(self) -> bool:
        return False

    @property
    def who_writes(self) -> str:
        return self.rollout.who_writes


class DraftRecipe(WarpRecipe):
    """How the student samples a drafted token.  The defaults are those of SKD."""

    temperature: float = Field(_interleaved.student_sampling["temperature"], ge=0)
    """Sampling temperature.  `0` is greedy decoding; higher values give more varied drafts."""
    top_p: float = Field(_interleaved.student_sampling["top_p"], gt=0, le=1)
    """Sample only from the smallest set of tokens whose probabilities sum to this value or more.
    `1` keeps every token.
    """


class ReplaceRecipe(WarpRecipe):
    """How the teacher samples the token that replaces a refused one.  The defaults are those of
    SKD.
    """

    temperature: float = Field(_interleaved.teacher_sampling["temperature"], ge=0)
    """Sampling temperature.  `0` is greedy decoding; higher values give more varied tokens."""
    top_p: float = Field(_interleaved.teacher_sampling["top_p"], gt=0, le=1)
    """Sample only from the smallest set of tokens whose probabilities sum to this value or more.
    `1` keeps every token.
    """


class InterleavedRecipe(RolloutSection, TakesOptions):
    """Train on responses that both models write together (SKD): the student drafts tokens, and the
    teacher replaces those that it does not accept.  The options of the acceptance rule are keys of
    this section, such as `top_k` for `accept: top_k`.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {"accept": ACCEPT}

    kind: Literal["interleaved"] = "interleaved"
    accept: one_of(ACCEPT) = _interleaved.accept  # type: ignore[valid-type]
    """Rule that decides which drafted tokens stay: `top_k` keeps the teacher's likeliest tokens,
    `top_p` those in its nucleus, `mixture` gives a random share of positions to the teacher, and
    `switch` keeps all until the two models diverge.
    """
    block_size: Literal["auto"] | Annotated[int, Field(gt=0)] = _interleaved.block_size
    """Number of tokens that the student drafts before the teacher scores them.  `auto` measures the
    fastest number while writing.  It changes the responses only through rounding, but a number is
    needed for a resumed run to be equal bit for bit.
    """
    max_new_tokens: int = Field(_interleaved.max_new_tokens, gt=0)
    """Length at which a response is cut off, in tokens."""
    student_sampling: DraftRecipe = DraftRecipe()
    """How the student samples the tokens that it drafts."""
    teacher_sampling: ReplaceRecipe = ReplaceRecipe()
    """How the teacher samples the tokens that replace refused ones."""
    batch_size: Literal["auto"] | Annotated[int, Field(gt=0)] = _interleaved.batch_size
    """Number of rows that are written at once, at most.  `auto` takes as many as the device writes
    well and its free memory holds.  It changes the responses only through rounding.
    """

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens

    @property
    def steps_both_models(self) -> bool:
        return True

    @property
    def who_writes(self) -> str:
        return "both models"


# The parts of a mixture.  A mixture cannot contain another mixture.
Own = Annotated[SampledRecipe | ReplayRecipe | InterleavedRecipe, Field(discriminator="kind")]
Other = Annotated[FixedRecipe | SampledRecipe, Field(discriminator="kind")]


class MixedRecipe(RolloutSection):
    """Let the student write a share of the steps, and another rollout the rest (GKD).  Each step is
    decided at random.
    """

    kind: Literal["mixed"] = "mixed"
    share: Share = ConstantShareRecipe(value=_mixed.share)
    """Probability that `student` writes a step, from 0 to 1: a number, or a schedule."""
    student: Own = SampledRecipe()
    """Rollout in which the student writes: of kind `sampled`, `replay` or `interleaved`."""
    other: Other = FixedRecipe()
    """Rollout of the other steps: `fixed` for the responses of the dataset, or `sampled`."""

    @field_validator("share", mode="before")
    @classmethod
    def _a_number_is_a_constant(cls, given: Any) -> Any:
        # `share: 0.5` is short for a section, because a union by `kind` accepts only mappings.
        is_section = isinstance(given, Mapping | Strict)
        return given if is_section else {"kind": "constant", "value": given}

    @property
    def takes_data(self) -> bool:
        return self.other.takes_data

    @property
    def new_tokens(self) -> int:
        return max(self.student.new_tokens, self.other.new_tokens)

    @property
    def most_rows(self) -> int | None:
        return self.student.most_rows

    @property
    def teacher_writes(self) -> bool:
        return self.student.teacher_writes or self.other.teacher_writes

    @property
    def has_labels(self) -> bool:
        return self.student.has_labels or self.other.has_labels

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
