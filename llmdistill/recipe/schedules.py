"""Numbers that change while training goes on: weights of objectives, shares of rollouts."""

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
    """A number that depends on how far training is.  `kind` is a name of schedules.SCHEDULES."""

    kind: str

    @property
    def mean(self) -> float | None:
        """Its mean over a run; None if that depends on what happens in it."""
        return None

    @property
    def last(self) -> float | None:
        """Its value at the end of a run; None if that depends on what happens in it."""
        return None

    @property
    def follows_the_loss(self) -> bool:
        """Does it need held-out losses?"""
        return False


class _BetweenTwo(ScheduleSection):
    start: float = Field(ge=0)
    """At the first step."""
    end: float = Field(ge=0)
    """At the last step."""

    @property
    def mean(self) -> float | None:
        return (self.start + self.end) / 2

    @property
    def last(self) -> float:
        return self.end


class ConstantRecipe(ScheduleSection):
    """The same number throughout."""

    kind: Literal["constant"] = "constant"
    value: float

    @property
    def mean(self) -> float:
        return self.value

    @property
    def last(self) -> float:
        return self.value


class LinearRecipe(_BetweenTwo):
    """From one number to another on a line."""

    kind: Literal["linear"] = "linear"


class CosineRecipe(_BetweenTwo):
    """From one number to another along half a cosine."""

    kind: Literal["cosine"] = "cosine"


class ExponentialRecipe(_BetweenTwo):
    """From one number to another by the same factor at each step."""

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
    """Large at first, then less after each part of the run: matches early, then lets go."""

    kind: Literal["critical_period"] = "critical_period"
    start: float = Field(ge=0)
    decay: float = Field(_critical.decay, gt=0, le=1)
    """The factor after each period."""
    periods: int = Field(_critical.periods, gt=0)
    """Equal parts of the run."""


class AdaptiveRecipe(ScheduleSection):
    """DistiLLM's: rises when the held-out loss does."""

    kind: Literal["adaptive"] = "adaptive"
    start: float = Field(_adaptive.start, ge=0, le=1)
    rise: float = Field(_adaptive.rise, gt=0, le=1)
    tolerance: float = Field(_adaptive.tolerance, ge=0)
    """Nats by which the held-out loss must have risen."""

    @property
    def follows_the_loss(self) -> bool:
        return True


class ConstantShareRecipe(ConstantRecipe):
    value: float = Field(ge=0, le=1)


class LinearShareRecipe(LinearRecipe):
    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)


class CosineShareRecipe(CosineRecipe):
    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)


Share = Annotated[
    ConstantShareRecipe | LinearShareRecipe | CosineShareRecipe | AdaptiveRecipe,
    Field(discriminator="kind"),
]


def described(given: float | ScheduleSection) -> tuple[str, dict[str, Any]]:
    """The kind of a weight or a share, and its fields; a number is of kind constant."""
    if isinstance(given, ScheduleSection):
        return given.kind, given.model_dump(exclude={"kind"})
    return "constant", {"value": given}


def _number_or_kind(given: Any) -> str:
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
