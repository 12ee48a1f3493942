"""Builds the objectives of a recipe: what is matched."""

from __future__ import annotations

from collections.abc import Callable

from llmdistill.objectives.base import Objective
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.recipe import objectives as sections
from llmdistill.schedules import Schedule, build_schedule


def build_objective(section: sections.ObjectiveRecipe) -> Objective:
    """Return the objective that a section of a recipe describes."""
    return _BUILDERS[type(section)](section, build_schedule(section.weight))


def _response(section: sections.ResponseRecipe, weight: float | Schedule) -> Objective:
    return ResponseObjective(
        section.divergence,
        target=section.target,
        token_weight=section.token_weight,
        weight=weight,
        scale_by_t2=section.scale_by_t2,
        **section.options(),
    )


def _plain(objective: Callable[..., Objective]) -> Callable[..., Objective]:
    """Return a builder for an objective whose parameters are the fields of its section."""
    return lambda section, weight: objective(
        weight=weight, **section.model_dump(exclude={"kind", "weight"})
    )


# One builder for each section; a new objective adds a line here.
_BUILDERS: dict[type, Callable[..., Objective]] = {
    sections.ResponseRecipe: _response,
    sections.CrossEntropyRecipe: _plain(CrossEntropyObjective),
    sections.HiddenRecipe: _plain(HiddenObjective),
}
