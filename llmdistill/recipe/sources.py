"""Sources of rows: part of every recipe that reads a dataset."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import Table, one_of

FORMATS = Table("data/formats.py", "FORMATS")


class SourceRecipe(Strict):
    """A source of rows and how to read it.  A name alone is short for `{source: name}`."""

    source: str
    """A `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, a folder of such files, a dataset on
    the Hub (`org/name`, `org/name:split` or `org/name:config:split`), or `seed_tasks` for the 175
    tasks that are included.  Without a split, a Hub dataset is read from `train`.
    """
    format: one_of(FORMATS, "auto") = "auto"  # type: ignore[valid-type]
    """Layout of the rows.  `auto` detects it from the fields of each row; set it if rows have the
    fields of several layouts.
    """
    columns: dict[str, str] = {}
    """Renamed fields, as `{expected name: name in the source}`.  For example `{instruction:
    question, output: answer}` reads the column `question` as `instruction`.
    """
    add: dict[str, str] = {}
    """Fields that each row of this source gets, such as `{domain: maths}`.  They can choose a row's
    teacher (kind `route`).
    """
    weight: float = Field(1.0, gt=0)
    """How often each row appears in an epoch: `2` is twice, `0.5` keeps half of the rows, the same
    half in every epoch.  Change it to mix several sources of training data.
    """


def one_or_several(given: Any) -> Any:
    """Return a list as it is, and any other value as a list of one."""
    return given if isinstance(given, list) else [given]


# Accept the short forms `data.jsonl` and `[a.jsonl, {source: b.csv}]`.
def _by_name(given: Any) -> Any:
    several = one_or_several(given)
    return [{"source": one} if isinstance(one, str) else one for one in several]


Sources = Annotated[list[SourceRecipe], BeforeValidator(_by_name)]
"""A list of sources, or one alone; each is a name or a `SourceRecipe`."""
