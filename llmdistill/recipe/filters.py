"""Filters: they decide which generated tasks are kept."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.facts import wrong_pattern
from llmdistill.recipe.sources import Sources, one_or_several
from llmdistill.recipe.tables import Table, defaults, one_of

FILTERS, MODEL_FILTERS = "instruct/filters.py", "instruct/model_filters.py"
_length = defaults(FILTERS, "Length")
_repeated_lines = defaults(FILTERS, "RepeatedLines")
_near_duplicates = defaults(FILTERS, "NearDuplicates")
_perplexity = defaults(FILTERS, "Perplexity")
_embeddings = defaults(MODEL_FILTERS, "Embeddings")
_score = defaults(MODEL_FILTERS, "Score")
ASPECTS = Table("instruct/judging.py", "ASPECTS")


def _a_pattern(pattern: str) -> str:
    if wrong := wrong_pattern(pattern):
        raise PydanticCustomError("pattern", "{wrong}", {"wrong": wrong})
    return pattern


ResultPattern = Annotated[str, AfterValidator(_a_pattern)]


class FilterSection(Strict):
    """Base of all filter sections: the properties that other code may use."""

    kind: str

    needs_log_probs: ClassVar[bool] = False
    """Whether the teacher must return the log-probability of its replies."""

    @property
    def scored_aspect(self) -> str | None:
        """What a judge must have scored; None if this filter needs no judge."""
        return None

    @property
    def kept_languages(self) -> list[str]:
        """Languages (ISO 639-1) of all kept rows; [] if this filter lets every language pass."""
        return []


class LengthRecipe(FilterSection):
    """Drop rows in which one field has too few or too many words."""

    kind: Literal["length"] = "length"
    field: Literal["instruction", "input", "output"] = _length.field
    """Field whose words are counted."""
    min_words: int = Field(_length.min_words, ge=0)
    """Smallest number of words that is kept."""
    max_words: int = Field(_length.max_words, gt=0)
    """Largest number of words that is kept."""


class TruncatedRecipe(FilterSection):
    """Drop answers that were cut off by the limit of new tokens."""

    kind: Literal["truncated"] = "truncated"


class DuplicatesRecipe(FilterSection):
    """Drop rows that equal a kept row: prompt and answer, and the messages and images before it."""

    kind: Literal["duplicates"] = "duplicates"


class BlacklistRecipe(FilterSection):
    """Drop instructions with a word that asks for more than text."""

    kind: Literal["blacklist"] = "blacklist"
    words: Annotated[list[str], Field(min_length=1)] | None = defaults(FILTERS, "Blacklist").words
    """Whole words or phrases to drop, in any case.  `null` is the list of Alpaca: images, files,
    drawing, music and similar words.
    """


class OddStartRecipe(FilterSection):
    """Drop instructions that start with a sign other than an opening mark, or with "Write a
    program".
    """

    kind: Literal["odd_start"] = "odd_start"


class RepeatedLinesRecipe(FilterSection):
    """Drop answers that repeat their lines or n-grams too often."""

    kind: Literal["repeated_lines"] = "repeated_lines"
    max_share: float = Field(_repeated_lines.max_share, ge=0, le=1)
    """Largest share of repeated lines, and of repeated n-grams, that is kept."""
    ngram: int = Field(_repeated_lines.ngram, gt=0)
    """Length of the n-grams in words."""
    max_code_share: float = Field(_repeated_lines.max_code_share, ge=0, le=1)
    """Largest share of repeated lines in fenced code that is kept.  Its lines repeat more often."""


class EmptyOrEchoRecipe(FilterSection):
    """Drop answers that are empty, only punctuation, or a copy of the question."""

    kind: Literal["empty_or_echo"] = "empty_or_echo"


class OpenEndRecipe(FilterSection):
    """Drop rows whose input or answer ends with a colon, because something is missing after it."""

    kind: Literal["open_end"] = "open_end"


class RougeRecipe(FilterSection):
    """Drop instructions that are too similar to a seed task or a kept row, by ROUGE-L F."""

    kind: Literal["rouge"] = "rouge"
    at_most: float = Field(defaults(FILTERS, "Rouge").at_most, ge=0, le=1)
    """Largest ROUGE-L F score to any other instruction that is kept, from 0 to 1.  Lower it for
    more varied rows.
    """
    most_similar: int = Field(defaults(FILTERS, "Rouge").most_similar, ge=0)
    """Number of the most similar instructions that each row gets as a column, with the mean
    similarity to all: Alpaca has 10.  It takes longer, because all similarities are computed.
    """


class NearDuplicatesRecipe(FilterSection):
    """Drop rows that nearly repeat a kept row, by MinHash over the n-grams of prompt and answer."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(_near_duplicates.threshold, gt=0, le=1)
    """Jaccard similarity of the n-grams from which a row is dropped, up to 1."""
    ngram: int = Field(_near_duplicates.ngram, gt=0)
    """Length of the n-grams in words."""


class EmbeddingsRecipe(FilterSection):
    """Drop rows that mean nearly the same as a kept row, by the cosine of their embeddings.  It
    needs the extra `embeddings`.
    """

    kind: Literal["embeddings"] = "embeddings"
    model: str
    """Hub id or folder of a Sentence Transformers model."""
    threshold: float = Field(_embeddings.threshold, gt=0, le=1)
    """Cosine from which a row is dropped."""
    field: Literal["instruction", "output"] = _embeddings.field
    """Field that is compared."""


class ScoreRecipe(FilterSection):
    """Drop rows by the score of a judge (the section `judge`).  Set at least one bound."""

    kind: Literal["score"] = "score"
    aspect: one_of(ASPECTS)  # type: ignore[valid-type]
    """What the judge was asked for: `quality` or `difficulty`."""
    at_least: float | None = Field(_score.at_least, ge=1, le=10)
    """Smallest score that is kept, from 1 to 10."""
    at_most: float | None = Field(_score.at_most, ge=1, le=10)
    """Largest score that is kept, from 1 to 10."""

    @property
    def scored_aspect(self) -> str:
        return self.aspect

    @model_validator(mode="after")
    def _a_bound(self) -> ScoreRecipe:
        if self.at_most is None and self.at_least is None:
            raise PydanticCustomError("score", "set 'at_most', 'at_least' or both")
        return self


class PythonFilterRecipe(FilterSection):
    """Drop rows with a function of your own: `docs/extending.md` has an example."""

    kind: Literal["python"] = "python"
    function: str
    """The function (or subclass of `Filter`), as `path/to/file.py:name`."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""


class ContaminationRecipe(FilterSection):
    """Drop rows that share an n-gram with an evaluation set, so that it can still be used to
    measure a model that is trained on the rows.
    """

    kind: Literal["contamination"] = "contamination"
    sources: Annotated[Sources, Field(min_length=1)]
    """Evaluation sets: a source or a list of sources."""
    ngram: int = Field(defaults(FILTERS, "Contamination").ngram, gt=0)
    """Length of the n-grams in words.  Shorter texts of 4 words or more are compared as a whole."""


class LanguageRecipe(FilterSection):
    """Drop rows in another language, as `py3langid` detects it."""

    kind: Literal["language"] = "language"
    languages: Annotated[list[str], BeforeValidator(one_or_several), Field(min_length=1)] = list(
        defaults(FILTERS, "Language").languages
    )
    """Languages to keep, as one ISO 639-1 code or a list: `en` or `[en, de]`."""

    @property
    def kept_languages(self) -> list[str]:
        return self.languages


class SameResultRecipe(FilterSection):
    """Drop answers whose result differs from that of the reference, which is the answer of the
    original row.  Rows without a reference are kept.
    """

    kind: Literal["same_result"] = "same_result"
    pattern: ResultPattern
    """Regular expression that finds the result in an answer.  The last match is the result, or its
    group if the pattern has one: `'#### (-?[\\d,.]+)'`.
    """


class PerplexityRecipe(FilterSection):
    """Drop answers that the teacher itself finds too unlikely or too likely.  High perplexity is a
    sign of rambling, very low perplexity of recitation or repetition.  Set at least one bound.
    """

    needs_log_probs: ClassVar[bool] = True

    kind: Literal["perplexity"] = "perplexity"
    at_most: float | None = Field(_perplexity.at_most, gt=1)
    """Largest perplexity that is kept; `null` sets no bound."""
    at_least: float | None = Field(_perplexity.at_least, ge=1)
    """Smallest perplexity that is kept; `null` sets no bound."""

    @model_validator(mode="after")
    def _a_bound(self) -> PerplexityRecipe:
        if self.at_most is None and self.at_least is None:
            raise PydanticCustomError("perplexity", "set 'at_most', 'at_least' or both")
        return self


FilterRecipe = Annotated[
    LengthRecipe
    | TruncatedRecipe
    | DuplicatesRecipe
    | BlacklistRecipe
    | OddStartRecipe
    | RepeatedLinesRecipe
    | EmptyOrEchoRecipe
    | OpenEndRecipe
    | RougeRecipe
    | NearDuplicatesRecipe
    | EmbeddingsRecipe
    | ScoreRecipe
    | PythonFilterRecipe
    | ContaminationRecipe
    | LanguageRecipe
    | SameResultRecipe
    | PerplexityRecipe,
    Field(discriminator="kind"),
]
