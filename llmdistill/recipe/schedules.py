"""Numbers that change during training: weights of objectives, shares of rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import defaults

_critical = defaults("schedules.py", "CriticalPeriod")
_adaptive = defaults("schedules.py", "Adaptive")


class ScheduleSection(Strict):
    """Base of all schedules: numbers that change during a run.  `kind` is a key of SCHEDULES."""

    kind: str

    @property
    def mean(self) -> float | None:
        """Mean over a run; None if it depends on the course of the run."""
        return None

    @property
    def last(self) -> float | None:
        """Value at the end of a run; None if it depends on the course of the run."""
        return None

    @property
    def follows_the_loss(self) -> bool:
        """Whether the schedule needs held-out losses."""
        return False


class _BetweenTwo(ScheduleSection):
    """Base of the schedules from one number to another."""

    start: float = Field(ge=0)
    """Value at the first step."""
    end: float = Field(ge=0)
    """Value at the last step."""

    @property
    def mean(self) -> float | None:
        return (self.start + self.end) / 2

    @property
    def last(self) -> float:
        return self.end


class ConstantRecipe(ScheduleSection):
    """The same number throughout the run.  A plain number is short for it."""

    kind: Literal["constant"] = "constant"
    value: float
    """The number."""

    @property
    def mean(self) -> float:
        return self.value

    @property
    def last(self) -> float:
        return self.value


class LinearRecipe(_BetweenTwo):
    """A straight line from one number to another."""

    kind: Literal["linear"] = "linear"


class CosineRecipe(_BetweenTwo):
    """Half a cosine from one number to another, which changes slowly at both ends."""

    kind: Literal["cosine"] = "cosine"


class ExponentialRecipe(_BetweenTwo):
    """Multiplication by the same factor at each step, from one number to another.  Both must be
    above 0.
    """

    kind: Literal["exponential"] = "exponential"

    @model_validator(mode="after")
    def _above_zero(self) -> ExponentialRecipe:
        if not (self.start > 0 and self.end > 0):
            raise PydanticCustomError(
                "exponential",
                "'start' and 'end' of an exponential schedule must be above 0. Use a linear or "
                "cosine schedule to reach 0.",
            )
        return self


class CriticalPeriodRecipe(ScheduleSection):
    """A weight that starts large and shrinks after each part of the run.  The objective then shapes
    the student early in training and hardly matters at the end (Passalis et al. 2020).
    """

    kind: Literal["critical_period"] = "critical_period"
    start: float = Field(ge=0)
    """Value in the first period."""
    decay: float = Field(_critical.decay, gt=0, le=1)
    """Factor that the value is multiplied by after each period."""
    periods: int = Field(_critical.periods, gt=0)
    """Number of periods, which are equal parts of the run."""


class AdaptiveRecipe(ScheduleSection):
    """A share that rises whenever the held-out loss has risen, up to 1 (DistiLLM).  It needs
    `evaluate.every_steps` and held-out rows.
    """

    kind: Literal["adaptive"] = "adaptive"
    start: float = Field(_adaptive.start, ge=0, le=1)
    """Share at the first step."""
    rise: float = Field(_adaptive.rise, gt=0, le=1)
    """Amount that is added to the share at each rise."""
    tolerance: float = Field(_adaptive.tolerance, ge=0)
    """Increase of the held-out loss in nats that makes the share rise.  The loss is compared with
    the loss at the last rise, and at first with the first measurement.
    """

    @property
    def follows_the_loss(self) -> bool:
        return True


# A share is a probability, so its numbers are at most 1: the fields are declared again to narrow
# the bounds of a weight.
class ConstantShareRecipe(ConstantRecipe):
    """The same share throughout the run.  A plain number is short for it."""

    value: float = Field(ge=0, le=1)
    """The share, from 0 to 1."""


class LinearShareRecipe(LinearRecipe):
    """A straight line from one share to another."""

    start: float = Field(ge=0, le=1)
    """Share at the first step, from 0 to 1."""
    end: float = Field(ge=0, le=1)
    """Share at the last step, from 0 to 1."""


class CosineShareRecipe(CosineRecipe):
    """Half a cosine from one share to another, which changes slowly at both ends."""

    start: float = Field(ge=0, le=1)
    """Share at the first step, from 0 to 1."""
    end: float = Field(ge=0, le=1)
    """Share at the last step, from 0 to 1."""


Share = Annotated[
    ConstantShareRecipe | LinearShareRecipe | CosineShareRecipe | AdaptiveRecipe,
    Field(discriminator="kind"),
]


def described(given: float | ScheduleSection) -> tuple[str, dict[str, Any]]:
    """Return the kind of a weight or share, and its fields; a plain number is of kind constant."""
    if isinstance(given, ScheduleSection):
        return given.kind, given.model_dump(exclude={"kind"})
    return "constant", {"value": given}


def _number_or_kind(given: Any) -> str:
    # Anything that is neither a mapping nor a section gets the tag `number`, so that its error
    # states that a number is expected.
    if isinstance(given, Mapping):
        return str(given.get("kind"))
    return getattr(given, "kind", "number")


Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")]
    | Annotated[LinearRecipe, Tag("linear")]
    | Annotated[CosineRecipe, Tag("cosine")]
    | Annotated[ExponentialRecipe, Tag("exponential")]
    | Annotated[CriticalPeriodRecipe, Tag("critical_period")],
    Discriminator(_number_or_kind),
]
"""A number, or a schedule."""
