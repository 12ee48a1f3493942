"""Recipes built from plain dicts."""

from __future__ import annotations

from typing import Any

from llmdistill import recipe as recipes


def build_generation(values: dict[str, Any]) -> recipes.GenerationRecipe:
    """What `recipes.load_generation` makes of a file that holds `values`."""
    return recipes.build_part(recipes.GenerationRecipe, values, "recipe")
