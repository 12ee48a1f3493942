"""A recipe of `llmdistill generate`: who makes which tasks, and which of them are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.facts import wrong_pattern
from llmdistill.recipe.questions import LocalTeacherRecipe, WarpRecipe, kind_or_local
from llmdistill.recipe.sources import SourceRecipe, Sources


class RemoteTeacherRecipe(Strict):
    """A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted one)."""

    kind: Literal["remote"] = "remote"
    model: str
    """Its name on the server."""
    url: str = "http://localhost:8000/v1"
    tokenizer: str | None = None
    """A Hub id or a folder; needed where the prompt is no chat (magpie)."""
    revision: str | None = None
    """Noted in every row; the server decides what it serves."""
    key_from: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself stands nowhere."""
    concurrency: int = Field(8, gt=0)
    timeout: float = Field(120.0, gt=0)
    """Seconds for one request."""
    retries: int = Field(6, ge=0)
    per_minute: int | None = Field(None, gt=0)
    """Requests begun a minute; None: as many as `concurrency` lets through."""


WriterRecipe = Annotated[
    Annotated[LocalTeacherRecipe, Tag("local")] | Annotated[RemoteTeacherRecipe, Tag("remote")],
    Discriminator(kind_or_local),
]


class AlpacaRecipe(Strict):
    """Whole tasks, several a call, after examples from the seeds."""

    kind: Literal["alpaca"] = "alpaca"
    tasks_per_call: int = Field(17, gt=0)
    """A small teacher follows a list of one better than one of many."""
    examples: int = Field(3, gt=0)
    sampling: WarpRecipe = WarpRecipe()
    max_new_tokens: int = Field(3072, gt=0)


class SelfInstructRecipe(Strict):
    """Instructions first, then whether they classify, then an input and its output."""

    kind: Literal["self_instruct"] = "self_instruct"
    tasks_per_call: int = Field(8, gt=0)
    examples: int = Field(8, gt=0)
    machine_examples: int = Field(2, ge=0)
    """How many of the examples are tasks made before."""
    sampling: WarpRecipe = WarpRecipe(temperature=0.7, top_p=0.5)
    max_new_tokens: int = Field(1024, gt=0)
    max_instance_tokens: int = Field(350, gt=0)


class MagpieRecipe(Strict):
    """The teacher writes what a user would say, then answers it."""

    kind: Literal["magpie"] = "magpie"
    sampling: WarpRecipe = WarpRecipe(top_p=0.99)
    """Of what the user says."""
    answer_sampling: WarpRecipe = WarpRecipe(temperature=0.0)
    max_instruction_tokens: int = Field(128, gt=0)
    max_new_tokens: int = Field(512, gt=0)


class AnswerRecipe(Strict):
    """Answers to given prompts."""

    kind: Literal["answer"] = "answer"
    prompts: Annotated[Sources, Field(min_length=1)]
    samples: int = Field(1, gt=0)
    sampling: WarpRecipe = WarpRecipe()
    max_new_tokens: int = Field(512, gt=0)


class RewriteRecipe(Strict):
    """Given answers in the teacher's own words."""

    kind: Literal["rewrite"] = "rewrite"
    prompts: Annotated[Sources, Field(min_length=1)]
    sampling: WarpRecipe = WarpRecipe(temperature=0.0)
    max_new_tokens: int = Field(512, gt=0)


class EvolveRecipe(Strict):
    """Harder and rarer variants of the seeds, with answers."""

    kind: Literal["evolve"] = "evolve"
    sampling: WarpRecipe = WarpRecipe()
    answer_sampling: WarpRecipe = WarpRecipe(temperature=0.0)
    max_instruction_tokens: int = Field(128, gt=0)
    max_new_tokens: int = Field(512, gt=0)


class LionRecipe(Strict):
    """Variants of what is hard for a student, and of what is easy, 1:1."""

    kind: Literal["lion"] = "lion"
    student: str
    """A Hub id or a folder."""
    pool: Annotated[Sources, Field(min_length=1)]
    """The tasks that are told apart."""
    by: Literal["divergence", "referee"] = "divergence"
    """divergence: mean KL on the teacher's answer, for a teacher on this machine; referee: the
    teacher scores both answers.
    """
    hard_share: float = Field(0.5, gt=0, lt=1)
    """by: divergence.  The share of the pool that counts as hard."""
    max_compared_tokens: int = Field(128, gt=0)
    """Of the answers that are compared."""
    sampling: WarpRecipe = WarpRecipe()
    answer_sampling: WarpRecipe = WarpRecipe(temperature=0.0)
    max_instruction_tokens: int = Field(128, gt=0)
    max_new_tokens: int = Field(512, gt=0)


GeneratorRecipe = Annotated[
    LionRecipe
    | AlpacaRecipe
    | SelfInstructRecipe
    | MagpieRecipe
    | AnswerRecipe
    | RewriteRecipe
    | EvolveRecipe,
    Field(discriminator="kind"),
]


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
    languages: list[str] = Field(["en"], min_length=1)
    """ISO 639-1."""


class SameResultRecipe(Strict):
    """Answers with another result than the reference's, where there is one."""

    kind: Literal["same_result"] = "same_result"
    pattern: str
    """A regular expression for the result: the last match counts, by its group."""

    @field_validator("pattern")
    @classmethod
    def _a_pattern(cls, pattern: str) -> str:
        if wrong := wrong_pattern(pattern):
            raise PydanticCustomError("pattern", "{wrong}", {"wrong": wrong})
        return pattern


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
    | SameResultRecipe,
    Field(discriminator="kind"),
]
# Where none are given: of answers to given prompts, the answers alone are judged.
ANSWER_FILTERS = ("truncated", "empty_or_echo", "repeated_lines")
TASK_FILTERS = (*ANSWER_FILTERS, "length", "odd_start", "blacklist", "rouge")


class GenerationRecipe(Strict):
    """A run of `llmdistill generate`."""

    seed: int = Field(0, ge=0)
    output: str
    """The folder of the data set."""
    teacher: WriterRecipe
    generator: GeneratorRecipe
    seeds: Sources = [SourceRecipe(source="seed_tasks")]
    """Tasks to show and to vary, and which nothing kept may be too like."""
    filters: list[FilterRecipe]
    target: int | None = Field(None, gt=0)
    """Rows to keep; None: until there are no more prompts."""
    batch_size: int = Field(32, gt=0)
    """Replies that are written at a time."""
    round_size: int = Field(64, gt=0)
    """Calls between two records; what is made depends on it, so a run keeps its own."""
    columns: Literal["messages", "alpaca"] = "messages"
    held_back: float = Field(0.05, ge=0, lt=1)
    """Share of the rows, chosen by their text, that go into a split of their own."""

    @model_validator(mode="before")
    @classmethod
    def _filters_of_its_kind(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("filters") is not None:
            return given
        generator = given.get("generator")
        kind = generator.get("kind") if isinstance(generator, Mapping) else None
        names = ANSWER_FILTERS if kind in ("answer", "rewrite") else TASK_FILTERS
        return {**given, "filters": [{"kind": name} for name in names]}

    @model_validator(mode="after")
    def _it_ends(self) -> GenerationRecipe:
        finite = isinstance(self.generator, AnswerRecipe | RewriteRecipe)
        if self.target is None and not finite:
            raise PydanticCustomError(
                "target", "'target' is missing: a generator of this kind never ends by itself"
            )
        return self

    @model_validator(mode="after")
    def _both_models_are_at_hand(self) -> GenerationRecipe:
        generator = self.generator
        remote = isinstance(self.teacher, RemoteTeacherRecipe)
        if remote and isinstance(generator, LionRecipe) and generator.by == "divergence":
            raise PydanticCustomError(
                "lion", "a remote teacher shows no distributions: use 'generator.by: referee'"
            )
        return self

    @model_validator(mode="after")
    def _a_template_is_known(self) -> GenerationRecipe:
        remote = isinstance(self.teacher, RemoteTeacherRecipe) and self.teacher.tokenizer is None
        if remote and isinstance(self.generator, MagpieRecipe):
            raise PydanticCustomError(
                "magpie",
                "a remote teacher speaks for the user only where its chat template is known: give "
                "'teacher.tokenizer'",
            )
        return self
