"""Which of the tasks that a generator made are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.facts import wrong_pattern
from llmdistill.recipe.sources import Sources, one_or_several


def _a_pattern(pattern: str) -> str:
    if wrong := wrong_pattern(pattern):
        raise PydanticCustomError("pattern", "{wrong}", {"wrong": wrong})
    return pattern


ResultPattern = Annotated[str, AfterValidator(_a_pattern)]


class LengthRecipe(Strict):
    """Words of one field."""

    kind: Literal["length"] = "length"
    field: Literal["instruction", "input", "output"] = "instruction"
    min_words: int = Field(4, ge=0)
    max_words: int = Field(150, gt=0)


class TruncatedRecipe(Strict):
    """Answers that the limit of new tokens cut off."""

    kind: Literal["truncated"] = "truncated"


class BlacklistRecipe(Strict):
    """Words in the instruction that ask for more than text."""

    kind: Literal["blacklist"] = "blacklist"
    words: Annotated[list[str], Field(min_length=1)] | None = None
    """None: images, files, drawing, music and the like."""


class OddStartRecipe(Strict):
    """Instructions that start with punctuation, outside ASCII, or with "Write a program"."""

    kind: Literal["odd_start"] = "odd_start"


class RepeatedLinesRecipe(Strict):
    """Answers that repeat their lines or their runs of words."""

    kind: Literal["repeated_lines"] = "repeated_lines"
    max_share: float = Field(0.3, ge=0, le=1)
    ngram: int = Field(4, gt=0)


class EmptyOrEchoRecipe(Strict):
    """No answer, or the question as the answer."""

    kind: Literal["empty_or_echo"] = "empty_or_echo"


class OpenEndRecipe(Strict):
    """An input or an answer that ends with a colon."""

    kind: Literal["open_end"] = "open_end"


class RougeRecipe(Strict):
    """Instructions too like a seed or one that was kept: ROUGE-L F."""

    kind: Literal["rouge"] = "rouge"
    at_most: float = Field(0.7, ge=0, le=1)


class NearDuplicatesRecipe(Strict):
    """Rows that nearly stand in another one: MinHash over runs of words."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(0.8, gt=0, le=1)
    ngram: int = Field(3, gt=0)


class ContaminationRecipe(Strict):
    """Rows that share a run of words with an evaluation set."""

    kind: Literal["contamination"] = "contamination"
    sources: Annotated[Sources, Field(min_length=1)]
    ngram: int = Field(10, gt=0)


class LanguageRecipe(Strict):
    """Rows in another language."""

    kind: Literal["language"] = "language"
    languages: Annotated[list[str], BeforeValidator(one_or_several), Field(min_length=1)] = ["en"]
    """ISO 639-1."""


class SameResultRecipe(Strict):
    """Answers with another result than the reference's, where there is one."""

    kind: Literal["same_result"] = "same_result"
    pattern: ResultPattern
    """A regular expression for the result: the last match counts, by its group."""


class PerplexityRecipe(Strict):
    """Answers that the teacher itself found unlikely, or all too likely."""

    kind: Literal["perplexity"] = "perplexity"
    at_most: float | None = Field(None, gt=1)
    at_least: float | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _a_bound(self) -> PerplexityRecipe:
        if self.at_most is None and self.at_least is None:
            raise PydanticCustomError("perplexity", "give 'at_most', 'at_least', or both")
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
