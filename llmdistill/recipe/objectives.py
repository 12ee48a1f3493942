"""The objectives of a recipe: what the student matches.  `objectives/build.py` builds them."""

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
    """Base of all objective sections: the properties that other code may use."""

    kind: str
    weight: Weight = _objective.weight
    """Factor of the objective's mean in the loss: a number, or a schedule over the run.  Change it
    to balance several objectives.
    """

    @property
    def teacher_needs(self) -> frozenset[str]:
        """Kinds of `Need` that the objective asks of the teacher."""
        return frozenset()

    @property
    def ends_at_zero(self) -> bool:
        """Whether the weight is 0 at the end of a run."""
        # `last` is None for a schedule that adapts, and None == 0 is False.
        return (self.weight.last if isinstance(self.weight, ScheduleSection) else self.weight) == 0


class ResponseRecipe(ObjectiveSection, TakesOptions):
    """Match the teacher's next-token distributions.  The options of `divergence`, `target` and
    `token_weight` are keys of this section, such as `beta` for `divergence: jsd`.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {
        "divergence": DIVERGENCES,
        "target": TARGETS,
        "token_weight": TOKEN_WEIGHTS,
    }

    kind: Literal["response"] = "response"
    divergence: one_of(DIVERGENCES) = _response.divergence  # type: ignore[valid-type]
    """Divergence between the teacher's and the student's distribution of each token."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of both distributions in the divergence.  Sampling has a separate one."""
    scale_by_t2: bool = _response.scale_by_t2
    """Multiply the loss by the square of `temperature`, so that its gradient stays comparable in
    size with that of a `cross_entropy`.
    """
    target: one_of(TARGETS) = _response.target  # type: ignore[valid-type]
    """Distribution that the student is compared with."""
    token_weight: one_of(TOKEN_WEIGHTS) = _response.token_weight  # type: ignore[valid-type]
    """How much each token of a response counts."""

    @property
    def teacher_needs(self) -> frozenset[str]:
        return frozenset({"distribution"})

    # `temperature` is a declared field, so `TakesOptions` does not refuse it for a divergence that
    # has none.
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
        # A declared field, so it is not among the extra values that hold the other options.
        own = {"temperature": self.temperature} if self._takes_temperature else {}
        return own | super().options()


class CrossEntropyRecipe(ObjectiveSection):
    """Match the tokens themselves, as in supervised fine-tuning.  Tokens that the student wrote do
    not count, so the objective needs a rollout with other tokens.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"


class HiddenRecipe(ObjectiveSection):
    """Match the hidden states after one decoder layer of each model.  Layers are counted from 1;
    `0` is the embeddings and `-1` the last layer.  If the hidden sizes differ, a linear projector
    is trained with the student and not exported.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {"distance": DISTANCES}

    kind: Literal["hidden"] = "hidden"
    distance: one_of(DISTANCES) = _hidden.distance  # type: ignore[valid-type]
    """Distance between two states: `mse` is the mean squared difference, `cosine` is 1 minus the
    cosine of the angle.
    """
    student_layer: int = _hidden.student_layer
    """Layer of the student whose states are matched.  Negative numbers count from the end."""
    teacher_layer: int = _hidden.teacher_layer
    """Layer of the teacher whose states are matched.  Negative numbers count from the end."""
    tokens: Literal["predicted", "all"] = _hidden.tokens
    """Tokens whose states are matched: `predicted` takes the states that predict the response,
    `all` also those of the prompt.
    """

    @property
    def teacher_needs(self) -> frozenset[str]:
        return frozenset({"hidden"})


ObjectiveRecipe = Annotated[
    ResponseRecipe | CrossEntropyRecipe | HiddenRecipe, Field(discriminator="kind")
]
