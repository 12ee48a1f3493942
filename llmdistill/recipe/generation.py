"""A recipe of `llmdistill generate`: who makes which tasks, and which of them are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, get_args

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.filters import FilterRecipe
from llmdistill.recipe.generators import GeneratorRecipe, GeneratorSection
from llmdistill.recipe.remote import RemoteTeacherRecipe
from llmdistill.recipe.sources import SourceRecipe, Sources
from llmdistill.recipe.tables import Table, defaults, one_of
from llmdistill.recipe.teachers import LocalTeacherRecipe, kind_or_local

GenerationTeacher = Annotated[
    Annotated[LocalTeacherRecipe, Tag("local")] | Annotated[RemoteTeacherRecipe, Tag("remote")],
    Discriminator(kind_or_local),
]

ROW_FORMATS = Table("instruct/dataset.py", "ROW_FORMATS")
# Used if a recipe has no `filters`: of answers to given prompts, only the answers are judged.
ANSWER_FILTERS = ("truncated", "empty_or_echo", "repeated_lines")
TASK_FILTERS = (*ANSWER_FILTERS, "length", "odd_start", "blacklist", "rouge")


class GenerationRecipe(Strict):
    """A run of `llmdistill generate`."""

    RENAMED: ClassVar = {"seeds": "seed_tasks", "columns": "format", "held_back": "test_share"}
    MAY_CHANGE: ClassVar = ("target", "format", "test_share")
    """Keys that a resumed run may change, with those of its teacher."""

    seed: int = Field(0, ge=0)
    output: str
    """The folder of the data set."""
    teacher: GenerationTeacher
    generator: GeneratorRecipe
    seed_tasks: Sources = [SourceRecipe(source="seed_tasks")]
    """Tasks to show and to vary, and which nothing kept may be too like."""
    filters: list[FilterRecipe]
    target: int | None = Field(None, gt=0)
    """Rows to keep; None: until there are no more prompts."""
    batch_size: int = Field(defaults("instruct/responders.py", "LocalResponder").batch_size, gt=0)
    """Replies that are written at a time, on this machine."""
    round_size: int = Field(64, gt=0)
    """Calls between two records; what is made depends on it, so a run keeps its own."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the teacher's chat template: {enable_thinking: false}."""
    format: one_of(ROW_FORMATS) = "messages"  # type: ignore[valid-type]
    """What rows look like: messages, or Alpaca's instruction, input and output."""
    test_share: float = Field(0.05, ge=0, lt=1)
    """Share of the questions, chosen by their text, whose rows go into the split `test`."""

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
        if self.target is None and not self.generator.has_given_prompts:
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
        if self.generator.needs_template and self.teacher.tokenizer_source is None:
            raise PydanticCustomError(
                "template",
                "the teacher writes the user's turns, which needs its chat template. Set "
                "'teacher.tokenizer'.",
            )
        return self

    @model_validator(mode="after")
    def _continuous_batches_keep_no_states(self) -> GenerationRecipe:
        if not (self.needs_log_probs or self.teacher.is_remote):
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
        """Must the teacher give the log-probability of what it writes?"""
        return self.generator.needs_log_probs or any(f.needs_log_probs for f in self.filters)

    @property
    def sources(self) -> Sequence[SourceRecipe]:
        """Rows that the teacher is shown or asked."""
        return self.generator.sources(self.seed_tasks)

    def unchanging(self) -> dict[str, Any]:
        """What the rows depend on: what must stay as it is when a run is resumed."""
        given = self.model_dump(exclude={*self.MAY_CHANGE, "output"})
        return given | {"teacher": self.teacher.model_dump(exclude=set(self.teacher.MAY_CHANGE))}


def _section_of(generator: Any) -> type[GeneratorSection] | GeneratorSection:
    """The section that a generator is or will be, by its kind; the base if there is none."""
    if isinstance(generator, GeneratorSection):
        return generator
    kind = generator.get("kind") if isinstance(generator, Mapping) else None
    sections = get_args(get_args(GeneratorRecipe)[0])
    found = (one for one in sections if one.model_fields["kind"].default == kind)
    return next(found, GeneratorSection)
