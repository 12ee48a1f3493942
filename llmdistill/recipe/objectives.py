"""What is matched: the objectives of a recipe.  `objectives/build.py` builds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.options import TakesOptions
from llmdistill.recipe.schedules import ScheduleSection, Weight
from llmdistill.recipe.tables import Table, defaults, one_of

DIVERGENCES = Table("objectives/divergences.py", "DIVERGENCES")
TARGETS = Table("objectives/targets.py", "TARGETS")
TOKEN_WEIGHTS = Table("objectives/weights.py", "TOKEN_WEIGHTS")
DISTANCES = Table("objectives/features.py", "DISTANCES")
_objective = defaults("objectives/base.py", "Objective")
_response = defaults("objectives/response.py", "ResponseObjective")
_hidden = defaults("objectives/features.py", "HiddenObjective")


class ObjectiveSection(Strict):
    """What other code asks any objective section."""

    kind: str
    weight: Weight = _objective.weight
    """A factor on the objective's mean: a number, or a schedule over the run."""

    @property
    def teacher_needs(self) -> frozenset[str]:
        """The kinds of `Need` that it asks of the teacher."""
        return frozenset()

    @property
    def ends_at_zero(self) -> bool:
        """Has it no weight at the end of a run?"""
        return (self.weight.last if isinstance(self.weight, ScheduleSection) else self.weight) == 0


class ResponseRecipe(ObjectiveSection, TakesOptions):
    """What is matched: next-token distributions.

    The options of divergence, target and token weight stand next to them: `beta` for jsd and so on.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {
        "divergence": DIVERGENCES,
        "target": TARGETS,
        "token_weight": TOKEN_WEIGHTS,
    }

    kind: Literal["response"] = "response"
    divergence: one_of(DIVERGENCES) = _response.divergence  # type: ignore[valid-type]
    temperature: float = Field(1.0, gt=0)
    """Of the divergence; a sampler has its own."""
    scale_by_t2: bool = _response.scale_by_t2
    """Multiply by temperature^2, which keeps the gradient's size next to a cross-entropy."""
    target: one_of(TARGETS) = _response.target  # type: ignore[valid-type]
    """What the student is compared with."""
    token_weight: one_of(TOKEN_WEIGHTS) = _response.token_weight  # type: ignore[valid-type]
    """How much each token counts."""

    @property
    def teacher_needs(self) -> frozenset[str]:
        return frozenset({"distribution"})

    @model_validator(mode="after")
    def _a_temperature_is_taken(self) -> ResponseRecipe:
        if self.temperature != 1.0 and not self._takes_temperature:
            raise PydanticCustomError(
                "temperature",
                "divergence '{name}' has no temperature. Remove the key.",
                {"name": self.divergence},
            )
        return self

    @property
    def _takes_temperature(self) -> bool:
        return "temperature" in DIVERGENCES.options(self.divergence)

    def options(self) -> dict[str, Any]:
        own = {"temperature": self.temperature} if self._takes_temperature else {}
        return own | super().options()


class CrossEntropyRecipe(ObjectiveSection):
    """What is matched: the tokens themselves, if the student did not write them."""

    kind: Literal["cross_entropy"] = "cross_entropy"


class HiddenRecipe(ObjectiveSection):
    """What is matched: hidden states after one decoder layer of each model.

    Layers count from 1; 0 are the embeddings, -1 is the last layer.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {"distance": DISTANCES}

    kind: Literal["hidden"] = "hidden"
    distance: one_of(DISTANCES) = _hidden.distance  # type: ignore[valid-type]
    """mse: mean squared difference; cosine: 1 - cos of the angle."""
    student_layer: int = _hidden.student_layer
    teacher_layer: int = _hidden.teacher_layer
    tokens: Literal["predicted", "all"] = _hidden.tokens
    """predicted: the states that predict the response; all: those of the prompt too."""

    @property
    def teacher_needs(self) -> frozenset[str]:
        return frozenset({"hidden"})


ObjectiveRecipe = Annotated[
    ResponseRecipe | CrossEntropyRecipe | HiddenRecipe, Field(discriminator="kind")
]
