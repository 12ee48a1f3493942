"""The recipe of `llmdistill generate`: a teacher, a generator of tasks, and filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Folder, Seed, Strict, TemplateOptions
from llmdistill.recipe.filters import FilterRecipe
from llmdistill.recipe.generators import GeneratorRecipe, GeneratorSection
from llmdistill.recipe.remote import RemoteTeacherRecipe
from llmdistill.recipe.sources import SourceRecipe, Sources
from llmdistill.recipe.tables import Table, defaults, one_of
from llmdistill.recipe.teachers import (
    LocalTeacherRecipe,
    MultimodalTeacherRecipe,
    kind_or_local,
)

GenerationTeacher = Annotated[
    Annotated[LocalTeacherRecipe, Tag("local")]
    | Annotated[MultimodalTeacherRecipe, Tag("multimodal")]
    | Annotated[RemoteTeacherRecipe, Tag("remote")],
    Discriminator(kind_or_local),
]

ASPECTS = Table("instruct/judging.py", "ASPECTS")
_judge = defaults("instruct/judging.py", "Judge")
ROW_FORMATS = Table("instruct/dataset.py", "ROW_FORMATS")
# The filters of a recipe without `filters`.  If prompts are the user's, only answers are checked.
ANSWER_FILTERS = ("truncated", "duplicates", "empty_or_echo", "repeated_lines")
TASK_FILTERS = (*ANSWER_FILTERS, "length", "odd_start", "blacklist", "rouge")


class JudgeRecipe(Strict):
    """A model that scores what the teacher made, from 1 to 10 (LLM as a judge)."""

    aspects: Annotated[list[one_of(ASPECTS)], Field(min_length=1)] = list(  # type: ignore[valid-type]
        _judge.aspects
    )
    """What is scored: `quality` of the answer, `difficulty` of the question.  Each row gets a
    column `score_quality` or `score_difficulty`, which the filter `score` can use.
    """
    teacher: GenerationTeacher | None = None
    """Model that judges, with the keys of a teacher.  `null` is the teacher itself."""
    max_new_tokens: int = Field(_judge.max_new_tokens, gt=0)
    """Length at which a reply is cut off, in tokens.  Raise it for a judge that thinks."""


class GenerationRecipe(Strict):
    """A recipe of `llmdistill generate`: a teacher writes a dataset for training."""

    RENAMED: ClassVar = {"seeds": "seed_tasks", "columns": "format", "held_back": "test_share"}

    seed: Seed = 0
    """Seed of all sampling and of the choice of examples."""
    output: Folder
    """Folder of the dataset."""
    teacher: GenerationTeacher
    """Model that writes the dataset: of kind `local` on this machine, or `remote` on a server."""
    generator: GeneratorRecipe
    """How tasks are made."""
    seed_tasks: Sources = [SourceRecipe(source="seed_tasks")]
    """Tasks that generators show as examples or vary, and that the filter `rouge` compares with: a
    source or a list of sources.  The default is the 175 tasks that are included.
    """
    filters: list[FilterRecipe]
    """Filters that every task must pass, in order.  The default is `truncated`, `duplicates`,
    `empty_or_echo` and `repeated_lines`, and for generators without given prompts also `length`,
    `odd_start`, `blacklist` and `rouge`.
    """
    judge: JudgeRecipe | None = None
    """Model that scores each row.  `best_by: judge` works without this section, too: the teacher is
    then its own judge.
    """
    target: int | None = Field(None, gt=0)
    """Number of rows to keep.  `null` answers all given prompts; other generators need a number."""
    batch_size: int = Field(defaults("instruct/responders.py", "LocalResponder").batch_size, gt=0)
    """Number of replies that a local teacher writes at a time.  Lower it if memory runs out."""
    round_size: int = Field(64, gt=0)
    """Number of calls after which the rows are recorded."""
    chat_template_kwargs: TemplateOptions = {}
    """Options for the teacher's chat template, such as `{enable_thinking: false}`."""
    thinking: Literal["keep", "drop"] = "keep"
    """What happens to the thinking of a teacher that thinks before it answers.  `keep` saves it
    with the answer: as `reasoning_content` of the message, or in `<think>` tags before an Alpaca
    `output`.  `drop` saves the answer alone.  Filters look at the answer alone.
    """
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What happens to malformed rows of the sources: `stop` reports the first of them and stops,
    `skip` skips and counts them.
    """
    format: one_of(ROW_FORMATS) = "messages"  # type: ignore[valid-type]
    """Layout of the rows: `messages`, or `alpaca` for the fields `instruction`, `input` and
    `output`.
    """
    test_share: float = Field(0.05, ge=0, lt=1)
    """Share of the questions whose rows go into the split `test`.  They are chosen by their text,
    so the same question is never in both splits.
    """

    # The default depends on the generator, so it is filled in before the fields are checked.
    # `dump` then writes it out.
    @model_validator(mode="before")
    @classmethod
    def _filters_of_its_kind(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("filters") is not None:
            return given
        has_given_prompts = _section_of(given.get("generator")).has_given_prompts
        names = ANSWER_FILTERS if has_given_prompts else TASK_FILTERS
        return {**given, "filters": [{"kind": name} for name in names]}

    @model_validator(mode="after")
    def _it_ends(self) -> GenerationRecipe:
        if self.target is None and not self.generator.ends_by_itself:
            raise PydanticCustomError(
                "target",
                "'target' is missing. A generator of this kind does not end by itself, so set the "
                "number of rows to keep.",
            )
        return self

    @model_validator(mode="after")
    def _the_teacher_gives_what_is_needed(self) -> GenerationRecipe:
        if self.generator.needs_distributions and self.teacher.is_remote:
            raise PydanticCustomError(
                "distributions",
                "the generator needs next-token distributions, which a remote teacher does not "
                "provide. Use 'generator.compare_by: referee'.",
            )
        if self.teacher.sees_images and not self.generator.takes_images:
            raise PydanticCustomError(
                "images",
                "a teacher of kind multimodal answers prompts with images. Use 'generator: {kind: "
                "answer, prompts: ...}'.",
            )
        if self.teacher.sees_images and self.needs_log_probs:
            raise PydanticCustomError(
                "images",
                "a teacher of kind multimodal gives no log-probabilities. Remove 'best_by: "
                "likelihood' and the perplexity filter.",
            )
        if self.generator.needs_template and self.teacher.tokenizer_source is None:
            raise PydanticCustomError(
                "template",
                "the teacher writes the user's turns, which needs its chat template. Set "
                "'teacher.tokenizer'.",
            )
        return self

    @model_validator(mode="after")
    def _scores_come_from_somewhere(self) -> GenerationRecipe:
        asked = self.judge.aspects if self.judge else []
        for one in self.filters:
            if one.scored_aspect and one.scored_aspect not in asked:
                raise PydanticCustomError(
                    "score",
                    "the filter 'score' needs a judge of '{aspect}'. Set 'judge: {aspects: "
                    "[{aspect}]}'.",
                    {"aspect": one.scored_aspect},
                )
        judge = self.judge.teacher if self.judge else None
        if self.teacher.sees_images and judge is not None and not judge.sees_images:
            raise PydanticCustomError(
                "judge",
                "the judge would not see the images of the prompts. Leave 'judge.teacher' out, or "
                "set its kind to multimodal.",
            )
        if any(getattr(one, "placement", "whole") == "sharded" for one in (self.teacher, judge)):
            raise PydanticCustomError(
                "sharded",
                "the ranks ask the teacher for different rows, and would wait for each other with "
                "'placement: sharded'. Use another placement.",
            )
        if "quality" in asked and not self.generator.answers:
            raise PydanticCustomError(
                "judge",
                "rows without answers have no 'quality'. Set 'judge.aspects: [difficulty]'.",
            )
        if self.generator.json_schema is not None and not self.teacher.is_remote:
            raise PydanticCustomError(
                "json_schema",
                "'answering.json_schema' needs a teacher of kind remote, whose server makes "
                "answers follow it. Remove it.",
            )
        return self

    # Log-probabilities come from the hidden states of sampling, and continuous batching keeps none.
    # A server does its own batching.
    @model_validator(mode="after")
    def _continuous_batches_keep_no_states(self) -> GenerationRecipe:
        if not (self.needs_log_probs or self.teacher.is_remote or self.teacher.sees_images):
            return self
        for name, sampling in self.generator.samplings.items():
            if sampling.continuous:
                raise PydanticCustomError(
                    "continuous",
                    "'generator.{name}.continuous' needs a teacher of kind local, and cannot be "
                    "combined with 'best_by: likelihood' or a perplexity filter. Set it to false.",
                    {"name": name},
                )
        return self

    @property
    def needs_log_probs(self) -> bool:
        """Whether the teacher must return the log-probability of its replies."""
        return self.generator.needs_log_probs or any(f.needs_log_probs for f in self.filters)

    @property
    def sources(self) -> Sequence[SourceRecipe]:
        """Sources of the rows that the teacher is shown or asked."""
        return self.generator.sources(self.seed_tasks)

    @property
    def may_change(self) -> tuple[str, ...]:
        """Keys that a resumed run can change, in addition to those of its teacher.

        If the teacher is shown kept rows, its requests depend on all that decides what is kept.
        """
        always = ("target", "format", "test_share", "thinking", "batch_size", "on_bad_row")
        depends = () if self.generator.shows_kept_rows else ("filters", "judge", "round_size")
        return (*always, *depends)

    def unchanging(self) -> dict[str, Any]:
        """Return the values that the rows depend on, which a resumed run must not change."""
        given = self.model_dump(exclude={*self.may_change, "output"})
        given["teacher"] = self.teacher.model_dump(exclude=set(self.teacher.MAY_CHANGE))
        other = self.judge.teacher if self.judge else None
        if other is not None and "judge" in given:
            given["judge"]["teacher"] = other.model_dump(exclude=set(other.MAY_CHANGE))
        return given


def _section_of(generator: Any) -> type[GeneratorSection] | GeneratorSection:
    """Return the section of a generator by its kind, or the base class if the kind is unknown.

    `generator` is what the user wrote and is not validated yet.
    """
    if isinstance(generator, GeneratorSection):
        return generator
    kind = generator.get("kind") if isinstance(generator, Mapping) else None
    sections = get_args(get_args(GeneratorRecipe)[0])
    found = (one for one in sections if one.model_fields["kind"].default == kind)
    return next(found, GeneratorSection)
