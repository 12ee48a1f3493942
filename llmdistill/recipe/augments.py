"""The objectives of a recipe that change the inputs.  `objectives/augment.py` has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.distributions import (
    CkdRecipe,
    CorrelationRecipe,
    DistRecipe,
    ResponseRecipe,
)
from llmdistill.recipe.objective_base import ObjectiveSection
from llmdistill.recipe.tables import defaults

_mix = defaults("objectives/augment.py", "MixObjective")
_dropout = defaults("objectives/augment.py", "TokenDropoutObjective")
_adversarial = defaults("objectives/augment.py", "AdversarialObjective")

Wrapped = Annotated[
    Annotated[
        ResponseRecipe | CkdRecipe | DistRecipe | CorrelationRecipe, Field(discriminator="kind")
    ],
    BeforeValidator(lambda given: {"kind": given} if isinstance(given, str) else given),
]
"""The section of an objective, or its kind alone."""


class AugmentedRecipe(ObjectiveSection):
    """Base of the sections that compare both models on changed inputs, in further passes.  They do
    not replace the objectives on the unchanged inputs, which are listed apart.
    """

    of: Wrapped = ResponseRecipe()
    """The objective that compares the models: one of kind `response`, `ckd`, `dist` or
    `correlation`, without a `weight`.  `of: dist` is short for `of: {kind: dist}`.
    """

    @property
    def teacher_needs(self) -> frozenset[str]:
        return self.of.teacher_needs

    @property
    def needs_final_states(self) -> bool:  # type: ignore[override]
        return self.of.needs_final_states

    @property
    def sums_targets(self) -> bool:  # type: ignore[override]
        return self.of.sums_targets

    @model_validator(mode="after")
    def _one_weight(self) -> AugmentedRecipe:
        if self.of.weight != 1:
            raise PydanticCustomError(
                "augmented",
                "'of.weight' would have no effect. Set 'weight' of the objective around it.",
            )
        return self


class MixRecipe(AugmentedRecipe):
    """Compare both models on mixtures of two rows of a batch, in one more pass of each (MixKD)."""

    kind: Literal["mixkd"] = "mixkd"
    alpha: float = Field(_mix.alpha, gt=0)
    """Parameter of the Beta distribution that the share of the partner is drawn from.  The share is
    at most one half.  A smaller `alpha` mixes in less.
    """

    @property
    def changes_inputs(self) -> bool:
        return True


class TokenDropoutRecipe(AugmentedRecipe):
    """Compare both models on rows without some random tokens, in one more pass of each."""

    kind: Literal["token_dropout"] = "token_dropout"
    rate: float = Field(_dropout.rate, ge=0, lt=1)
    """Share of the tokens of prompt and response that are dropped, on average.  They are still
    predicted.  The first token of a row is never dropped.
    """
    teacher_sees: Literal["clean", "changed"] = _dropout.teacher_sees
    """What the teacher reads: `changed` is the same as the student, `clean` the whole row, which
    needs no further pass.
    """

    @property
    def changes_inputs(self) -> bool:
        return self.teacher_sees == "changed"


class AdversarialRecipe(AugmentedRecipe):
    """Compare both models where the student's embeddings are moved to raise the loss.  It takes a
    forward and a backward pass for each step of the attack, and one more pass for the loss.
    """

    kind: Literal["adversarial"] = "adversarial"
    epsilon: float = Field(_adversarial.epsilon, ge=0)
    """Longest move of a token's embedding, as a share of its length."""
    steps: int = Field(_adversarial.steps, gt=0)
    """Steps along the gradient.  `1` is a step of full length (FGM), more are steps of half the
    length from a random start (PGD).
    """
    teacher_sees: Literal["clean", "changed"] = _adversarial.teacher_sees
    """What the teacher reads: `clean` is the unchanged row.  `changed` also moves its embeddings to
    raise the loss, which takes as many passes of the teacher as of the student.
    """

    @property
    def changes_inputs(self) -> bool:
        return self.teacher_sees == "changed"

    @property
    def needs_gradients(self) -> bool:
        return self.teacher_sees == "changed"

    @model_validator(mode="after")
    def _a_divergence_moves_the_teacher(self) -> AdversarialRecipe:
        if self.needs_gradients and self.of.kind != "response":
            raise PydanticCustomError(
                "adversarial",
                "'teacher_sees: changed' moves the teacher along the gradient of a divergence. "
                "Set 'of: {kind: response}', or 'teacher_sees: clean'.",
            )
        return self
