"""Which of the tasks that a generator made are kept."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.facts import wrong_pattern
from llmdistill.recipe.sources import Sources, one_or_several
from llmdistill.recipe.tables import defaults

FILTERS = "instruct/filters.py"
_length = defaults(FILTERS, "Length")
_repeated_lines = defaults(FILTERS, "RepeatedLines")
_near_duplicates = defaults(FILTERS, "NearDuplicates")
_perplexity = defaults(FILTERS, "Perplexity")


def _a_pattern(pattern: str) -> str:
    if wrong := wrong_pattern(pattern):
        raise PydanticCustomError("pattern", "{wrong}", {"wrong": wrong})
    return pattern


ResultPattern = Annotated[str, AfterValidator(_a_pattern)]


class FilterSection(Strict):
    """Base of all sections that choose a filter: what the rest of the package asks of one."""

    kind: str

    needs_log_probs: ClassVar[bool] = False
    """Must the teacher give the log-probability of what it writes?"""

    @property
    def kept_languages(self) -> list[str]:
        """Languages (ISO 639-1) that all kept rows are in; [] if this filter lets all pass."""
        return []


class LengthRecipe(FilterSection):
    """Words of one field."""

    kind: Literal["length"] = "length"
    field: Literal["instruction", "input", "output"] = _length.field
    min_words: int = Field(_length.min_words, ge=0)
    max_words: int = Field(_length.max_words, gt=0)


class TruncatedRecipe(FilterSection):
    """Answers that the limit of new tokens cut off."""

    kind: Literal["truncated"] = "truncated"


class BlacklistRecipe(FilterSection):
    """Words in the instruction that ask for more than text."""

    kind: Literal["blacklist"] = "blacklist"
    words: Annotated[list[str], Field(min_length=1)] | None = defaults(FILTERS, "Blacklist").words
    """None: images, files, drawing, music and the like."""


class OddStartRecipe(FilterSection):
    """Instructions that start with punctuation, outside ASCII, or with "Write a program"."""

    kind: Literal["odd_start"] = "odd_start"


class RepeatedLinesRecipe(FilterSection):
    """Answers that repeat their lines or their runs of words."""

    kind: Literal["repeated_lines"] = "repeated_lines"
    max_share: float = Field(_repeated_lines.max_share, ge=0, le=1)
    ngram: int = Field(_repeated_lines.ngram, gt=0)


class EmptyOrEchoRecipe(FilterSection):
    """No answer, or the question as the answer."""

    kind: Literal["empty_or_echo"] = "empty_or_echo"


class OpenEndRecipe(FilterSection):
    """An input or an answer that ends with a colon."""

    kind: Literal["open_end"] = "open_end"


class RougeRecipe(FilterSection):
    """Instructions too like a seed or one that was kept: ROUGE-L F."""

    kind: Literal["rouge"] = "rouge"
    at_most: float = Field(defaults(FILTERS, "Rouge").at_most, ge=0, le=1)


class NearDuplicatesRecipe(FilterSection):
    """Rows that nearly stand in another one: MinHash over runs of words."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(_near_duplicates.threshold, gt=0, le=1)
    ngram: int = Field(_near_duplicates.ngram, gt=0)


class ContaminationRecipe(FilterSection):
    """Rows that share a run of words with an evaluation set."""

    kind: Literal["contamination"] = "contamination"
    sources: Annotated[Sources, Field(min_length=1)]
    ngram: int = Field(defaults(FILTERS, "Contamination").ngram, gt=0)


class LanguageRecipe(FilterSection):
    """Rows in another language."""

    kind: Literal["language"] = "language"
    languages: Annotated[list[str], BeforeValidator(one_or_several), Field(min_length=1)] = list(
        defaults(FILTERS, "Language").languages
    )
    """ISO 639-1."""

    @property
    def kept_languages(self) -> list[str]:
        return self.languages


class SameResultRecipe(FilterSection):
    """Answers with another result than the reference's, where there is one."""

    kind: Literal["same_result"] = "same_result"
    pattern: ResultPattern
    """A regular expression for the result: the last match counts, by its group."""


class PerplexityRecipe(FilterSection):
    """Answers that the teacher itself found unlikely, or all too likely."""

    needs_log_probs: ClassVar[bool] = True

    kind: Literal["perplexity"] = "perplexity"
    at_most: float | None = Field(_perplexity.at_most, gt=1)
    at_least: float | None = Field(_perplexity.at_least, ge=1)

    @model_validator(mode="after")
    def _a_bound(self) -> PerplexityRecipe:
        if self.at_most is None and self.at_least is None:
            raise PydanticCustomError("perplexity", "set 'at_most', 'at_least' or both")
        return self


FilterRecipe = Annotated[
    LengthRecipe
    | TruncatedRecipe
    | BlacklistRecipe
    | OddStartRecipe
    | RepeatedLinesRecipe
    | EmptyOrEchoRecipe
    | OpenEndRecipe
    | RougeRecipe
    | NearDuplicatesRecipe
    | ContaminationRecipe
    | LanguageRecipe
    | SameResultRecipe
    | PerplexityRecipe,
    Field(discriminator="kind"),
]
