"""Where rows come from: part of every recipe that reads some."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import Table, one_of

FORMATS = Table("data/formats.py", "FORMATS")


class SourceRecipe(Strict):
    """Where rows come from, and how they are read."""

    source: str
    """A .jsonl, .json, .csv, .tsv or .parquet file, a folder of such files, a data set of the Hub
    (org/name or org/name:split), or `seed_tasks`.
    """
    format: one_of(FORMATS, "auto") = "auto"  # type: ignore[valid-type]
    """How a row is laid out; auto: told by its fields."""
    columns: dict[str, str] = {}
    """Fields by other names: {instruction: question, output: answer}."""
    weight: float = Field(1.0, gt=0)
    """How often a row stands in an epoch: 2 is twice, 0.5 is half of the rows, always the same."""


def one_or_several(given: Any) -> Any:
    """A list; of one where it is none."""
    return given if isinstance(given, list) else [given]


def _by_name(given: Any) -> Any:
    several = one_or_several(given)
    return [{"source": one} if isinstance(one, str) else one for one in several]


Sources = Annotated[list[SourceRecipe], BeforeValidator(_by_name)]
"""Several, or one alone; each as its name, or with more to say."""
