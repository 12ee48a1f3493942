"""Recipes built from plain dicts."""

from __future__ import annotations

from typing import Any

from llmdistill import recipe as recipes


def build_generation(values: dict[str, Any]) -> recipes.GenerationRecipe:
    """Return the result of `recipes.load_generation` for a file with `values`."""
    return recipes.build_part(recipes.GenerationRecipe, values, "recipe")
