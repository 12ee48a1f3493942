"""Sampling settings: part of every section in which a model writes."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import defaults

_sampling = defaults("sampling.py", "Sampling")
_penalised = defaults("sampling.py", "PenalisedSampling")


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


class WritingRecipe(SamplingRecipe):
    """How one model samples a whole text of a dataset."""

    presence_penalty: float = Field(_penalised.presence_penalty, ge=-2, le=2)
    """Subtracted from the logit of each token that the text already contains.  Higher values give
    more varied lists.
    """
    frequency_penalty: float = Field(_penalised.frequency_penalty, ge=-2, le=2)
    """Subtracted from the logit of a token for each time that the text already contains it."""

    @property
    def is_penalised(self) -> bool:
        """Whether it avoids tokens that the text already contains."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @model_validator(mode="after")
    def _no_penalties_in_continuous_batches(self) -> WritingRecipe:
        if self.continuous and self.is_penalised:
            raise PydanticCustomError(
                "penalty",
                "penalties cannot be combined with continuous batching. Set 'continuous: false'.",
            )
        return self
