"""A recipe of `llmdistill generate`: who makes which tasks, and which of them are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.filters import FilterRecipe, PerplexityRecipe, ResultPattern
from llmdistill.recipe.sampling import SamplingRecipe
from llmdistill.recipe.sources import SourceRecipe, Sources
from llmdistill.recipe.teachers import LocalTeacherRecipe, kind_or_local


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
    license: str | None = None
    """Of the model, as the data set's card is to state it: apache-2.0."""
    key_from: str | None = None
    """The environment variable that holds the key; the key itself stands nowhere.  None:
    OPENAI_API_KEY for api.openai.com, and no key for any other server.
    """
    concurrency: int = Field(8, gt=0)
    timeout: float = Field(120.0, gt=0)
    """Seconds for one attempt."""
    retries: int = Field(6, ge=0)
    per_minute: int | None = Field(None, gt=0)
    """Requests begun a minute, by all ranks; None: as many as `concurrency` lets through."""

    @model_validator(mode="after")
    def _an_address_alone(self) -> RemoteTeacherRecipe:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PydanticCustomError("url", "'url' should be an address: http://host:port/v1")
        if parts.username or parts.password or parts.query:  # and the message must not repeat it
            raise PydanticCustomError(
                "url",
                "'url' holds a user, a key or a query, but recipes are shared: put the key into an "
                "environment variable and name that in 'key_from'",
            )
        return self


WriterRecipe = Annotated[
    Annotated[LocalTeacherRecipe, Tag("local")] | Annotated[RemoteTeacherRecipe, Tag("remote")],
    Discriminator(kind_or_local),
]


class AnsweringRecipe(Strict):
    """How a question is answered."""

    sampling: SamplingRecipe = SamplingRecipe(temperature=0.0)
    max_new_tokens: int = Field(512, gt=0)
    hint: str = ""
    """Stands below the question for the teacher, and in neither question nor answer of the row:
    Answer in two sentences.
    """


class DrawnAnswerRecipe(AnsweringRecipe):
    """The same, drawn: for several answers to one question."""

    sampling: SamplingRecipe = SamplingRecipe()


class AlpacaRecipe(Strict):
    """Whole tasks, several a call, after examples from the seeds."""

    kind: Literal["alpaca"] = "alpaca"
    tasks_per_call: int = Field(17, gt=0)
    """A small teacher follows a list of one better than one of many."""
    examples: int = Field(3, gt=0)
    answer: AnsweringRecipe | None = None
    """For small teachers, with tasks_per_call: 1.  The list gives the question alone, and the
    teacher is asked for its answer as a user would.
    """
    sampling: SamplingRecipe = SamplingRecipe()
    max_new_tokens: int = Field(3072, gt=0)

    @model_validator(mode="after")
    def _one_question(self) -> AlpacaRecipe:
        if self.answer is not None and self.tasks_per_call != 1:
            raise PydanticCustomError("answer", "'answer' is for 'tasks_per_call: 1'")
        return self


class SelfInstructRecipe(Strict):
    """Instructions first, then whether they classify, then an input and its output."""

    kind: Literal["self_instruct"] = "self_instruct"
    tasks_per_call: int = Field(8, gt=0)
    examples: int = Field(8, gt=0)
    machine_examples: int = Field(2, ge=0)
    """How many of the examples are tasks made before, once there are some."""
    sampling: SamplingRecipe = SamplingRecipe(temperature=0.7, top_p=0.5)
    max_new_tokens: int = Field(1024, gt=0)
    max_instance_tokens: int = Field(350, gt=0)

    @model_validator(mode="after")
    def _among_the_examples(self) -> SelfInstructRecipe:
        if self.machine_examples > self.examples:
            raise PydanticCustomError(
                "machine_examples", "'machine_examples' are some of the 'examples': not more"
            )
        return self


class MagpieRecipe(Strict):
    """The teacher writes what a user would say, then answers it."""

    kind: Literal["magpie"] = "magpie"
    sampling: SamplingRecipe = SamplingRecipe(top_p=0.99)
    """Of what the user says."""
    max_instruction_tokens: int = Field(128, gt=0)
    answer: AnsweringRecipe = AnsweringRecipe()


class AnswerRecipe(Strict):
    """Answers to given prompts."""

    kind: Literal["answer"] = "answer"
    prompts: Annotated[Sources, Field(min_length=1)]
    samples: int = Field(1, gt=0)
    best_by: Literal["likelihood", "consensus", "reference"] | None = None
    """Keep one of the samples: the one that the teacher finds likeliest (mean log-probability a
    token), that is most like the others, or most like the data set's answer (ROUGE-L).  None: all.
    """
    answer: DrawnAnswerRecipe = DrawnAnswerRecipe()

    @model_validator(mode="after")
    def _several_to_choose_from(self) -> AnswerRecipe:
        if self.best_by is not None and self.samples == 1:
            raise PydanticCustomError("best_by", "'best_by' chooses among 'samples': ask for more")
        if self.samples > 1 and self.answer.sampling.temperature == 0:
            raise PydanticCustomError(
                "samples", "several 'samples' at temperature 0 are all the same"
            )
        return self


class RewriteRecipe(Strict):
    """Given answers in the teacher's own words; where those are of no use, the given one stays."""

    kind: Literal["rewrite"] = "rewrite"
    prompts: Annotated[Sources, Field(min_length=1)]
    result: ResultPattern | None = None
    """A regular expression for the result, as for maths: the last match must stay the same."""
    sampling: SamplingRecipe = SamplingRecipe(temperature=0.0)
    max_new_tokens: int = Field(512, gt=0)


class EvolveRecipe(Strict):
    """Harder and rarer variants of the seeds, with answers."""

    kind: Literal["evolve"] = "evolve"
    sampling: SamplingRecipe = SamplingRecipe()
    max_instruction_tokens: int = Field(128, gt=0)
    answer: AnsweringRecipe = AnsweringRecipe()


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
    sampling: SamplingRecipe = SamplingRecipe()
    max_instruction_tokens: int = Field(128, gt=0)
    answer: AnsweringRecipe = AnsweringRecipe()


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
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the teacher's chat template: {enable_thinking: false}."""
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
    def _states_are_kept(self) -> GenerationRecipe:
        generator, remote = self.generator, isinstance(self.teacher, RemoteTeacherRecipe)
        if not self.is_scored and not remote:
            return self
        places = {"sampling": generator, "answer.sampling": getattr(generator, "answer", None)}
        for name, place in places.items():
            if getattr(getattr(place, "sampling", None), "continuous", False):
                raise PydanticCustomError(
                    "continuous",
                    "'generator.{name}.continuous' is for a teacher on this machine whose "
                    "log-probabilities are not asked for",
                    {"name": name},
                )
        return self

    @property
    def is_scored(self) -> bool:
        """Are the teacher's log-probabilities of what it writes needed?"""
        by = getattr(self.generator, "best_by", None)
        return by == "likelihood" or any(isinstance(f, PerplexityRecipe) for f in self.filters)

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
