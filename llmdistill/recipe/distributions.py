"""The objectives of a recipe that compare distributions.  `objectives/build.py` builds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.objective_base import OnDistributions, one_above_zero
from llmdistill.recipe.options import TakesOptions
from llmdistill.recipe.tables import Table, defaults, one_of

DIVERGENCES = Table("objectives/divergences.py", "DIVERGENCES")
TARGETS = Table("objectives/targets.py", "TARGETS")
TOKEN_WEIGHTS = Table("objectives/weights.py", "TOKEN_WEIGHTS")
_response = defaults("objectives/response.py", "ResponseObjective")
_ckd = defaults("objectives/ckd.py", "CkdObjective")
_dist = defaults("objectives/correlation.py", "DistObjective")
_correlation = defaults("objectives/correlation.py", "CorrelationObjective")


class ResponseRecipe(OnDistributions, TakesOptions):
    """Match the teacher's next-token distributions.  The options of `divergence`, `target` and
    `token_weight` are keys of this section, such as `beta` for `divergence: jsd`.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {
        "divergence": DIVERGENCES,
        "target": TARGETS,
        "token_weight": TOKEN_WEIGHTS,
    }

    sums_targets: ClassVar[bool] = True
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


class CkdRecipe(OnDistributions):
    """Match the differences between the logits of tokens from different responses (CKD)."""

    needs_final_states: ClassVar[bool] = True
    kind: Literal["ckd"] = "ckd"
    group: Literal[2, 3] = _ckd.group
    """Tokens in a tuple.  With 3, the mean of two tokens is compared with the third."""
    temperature: float = Field(_ckd.temperature, gt=0)
    """Temperature of the differences."""


class DistRecipe(OnDistributions):
    """Match distributions by Pearson's correlation: within each token, and along the tokens of the
    batch for each vocabulary entry (DIST).
    """

    kind: Literal["dist"] = "dist"
    inter: float = Field(_dist.inter, ge=0)
    """Factor on the correlation within each token."""
    intra: float = Field(_dist.intra, ge=0)
    """Factor on the correlation along the batch."""
    temperature: float = Field(_dist.temperature, gt=0)
    """Temperature of both distributions.  The loss is multiplied by its square."""

    @model_validator(mode="after")
    def _one_factor(self) -> DistRecipe:
        one_above_zero(self, "inter", "intra")
        return self


class CorrelationRecipe(OnDistributions):
    """Match distributions by their cosine and by the order of the likeliest tokens (R2KD)."""

    kind: Literal["correlation"] = "correlation"
    value: float = Field(_correlation.value, ge=0)
    """Factor on the cosines, within each token and along the batch."""
    rank: float = Field(_correlation.rank, ge=0)
    """Factor on the correlation of ranks."""
    ranked_tokens: int = Field(_correlation.ranked_tokens, gt=1)
    """Number of the teacher's likeliest tokens whose order is compared."""
    temperature: float = Field(_correlation.temperature, gt=0)
    """Temperature of the distributions in the cosines, which are multiplied by its square."""

    @model_validator(mode="after")
    def _one_factor(self) -> CorrelationRecipe:
        one_above_zero(self, "value", "rank")
        return self
