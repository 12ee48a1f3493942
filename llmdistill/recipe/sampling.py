"""How a model draws tokens: part of every section in which one writes."""

from __future__ import annotations

from pydantic import Field

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import defaults

_sampling = defaults("sampling.py", "Sampling")


class WarpRecipe(Strict):
    """How a token is drawn."""

    temperature: float = Field(_sampling.temperature, ge=0)
    """0 is greedy."""
    top_p: float = Field(_sampling.top_p, gt=0, le=1)
    """The smallest set of tokens with this probability is kept; 1 keeps every token."""
    top_k: int = Field(_sampling.top_k, ge=0)
    """The likeliest tokens are kept; 0 keeps every token."""


class SamplingRecipe(WarpRecipe):
    """How one model draws a whole response."""

    continuous: bool = _sampling.continuous
    """Rows join and leave the batch as they end (`generate_batch`, for GPUs).  A response then
    depends on its batch.
    """
