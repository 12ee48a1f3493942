"""What is matched?  Builds the objectives that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmdistill.objectives.base import Objective
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.recipe import objectives as sections
from llmdistill.schedules import build_schedule


def build_objective(section: sections.ObjectiveRecipe) -> Objective:
    """The objective that a recipe asks for."""
    fields = section.model_dump(exclude={"kind", "weight"})
    return _BUILDERS[type(section)](weight=build_schedule(section.weight), **fields)


# Each takes the fields of its section as keyword arguments.
_BUILDERS: dict[type, Callable[..., Any]] = {
    sections.ResponseRecipe: ResponseObjective,
    sections.CrossEntropyRecipe: CrossEntropyObjective,
    sections.HiddenRecipe: HiddenObjective,
}
