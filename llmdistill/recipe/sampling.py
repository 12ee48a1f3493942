"""Sampling settings: part of every section in which a model writes."""

from __future__ import annotations

from pydantic import Field

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import defaults

_sampling = defaults("sampling.py", "Sampling")


class WarpRecipe(Strict):
    """How one token is sampled."""

    temperature: float = Field(_sampling.temperature, ge=0)
    """Sampling temperature.  `0` is greedy decoding; higher values give more varied text."""
    top_p: float = Field(_sampling.top_p, gt=0, le=1)
    """Sample only from the smallest set of tokens whose probabilities sum to this value or more.
    `1` keeps every token.
    """
    top_k: int = Field(_sampling.top_k, ge=0)
    """Sample only from this many of the likeliest tokens.  `0` keeps every token."""


class SamplingRecipe(WarpRecipe):
    """How one model samples a whole response."""

    continuous: bool = _sampling.continuous
    """Use continuous batching (`generate_batch` of transformers), in which rows join and leave the
    batch as they end.  It is made for GPUs.  A response then also depends on the other rows of its
    batch.
    """
