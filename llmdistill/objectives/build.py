"""What is matched?  Builds the objectives that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmdistill import recipe
from llmdistill.objectives.base import Objective
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective


def build_objective(answer: recipe.ObjectiveRecipe) -> Objective:
    """The objective that a recipe asks for."""
    return _BUILDERS[type(answer)](answer)


def _response(answer: recipe.ResponseRecipe) -> Objective:
    options: dict[str, Any] = dict(answer.options())
    return ResponseObjective(
        answer.divergence,
        target=answer.target,
        token_weight=answer.token_weight,
        weight=answer.weight,
        scale_by_t2=answer.scale_by_t2,
        **options,
    )


def _cross_entropy(answer: recipe.CrossEntropyRecipe) -> Objective:
    return CrossEntropyObjective(weight=answer.weight)


_BUILDERS: dict[type, Callable[..., Objective]] = {
    recipe.ResponseRecipe: _response,
    recipe.CrossEntropyRecipe: _cross_entropy,
}
