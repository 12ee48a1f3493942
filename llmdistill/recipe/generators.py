"""How tasks are made: one section of a recipe per generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.filters import ResultPattern
from llmdistill.recipe.sampling import SamplingRecipe
from llmdistill.recipe.sources import SourceRecipe, Sources
from llmdistill.recipe.tables import Table, defaults, one_of

SCORERS = Table("instruct/scorers.py", "SCORERS")

_answering = defaults("instruct/generators/base.py", "Answering")
_alpaca = defaults("instruct/generators/lists.py", "Alpaca")
_self_instruct = defaults("instruct/generators/lists.py", "SelfInstruct")
_answer = defaults("instruct/generators/given.py", "Answer")
_rewrite = defaults("instruct/generators/given.py", "Rewrite")
_magpie = defaults("instruct/generators/variants.py", "Magpie")
_evolve = defaults("instruct/generators/variants.py", "Evolve")
_lion = defaults("instruct/generators/variants.py", "Lion")


class AnsweringRecipe(Strict):
    """How a question is answered."""

    sampling: SamplingRecipe = SamplingRecipe(**_answering.sampling)
    max_new_tokens: int = Field(_answering.max_new_tokens, gt=0)
    hint: str = _answering.hint
    """Appended to the prompt that the teacher sees, and not saved in the row: Answer in two
    sentences.
    """


class DrawnAnsweringRecipe(AnsweringRecipe):
    """The same, drawn: for several answers to one question."""

    sampling: SamplingRecipe = SamplingRecipe(**_answer.answering["sampling"])


class GeneratorSection(Strict):
    """Base of all sections that choose a generator: what the rest of the package asks of one."""

    kind: str

    has_given_prompts: ClassVar[bool] = False
    """Are the prompts those of the user's rows?  Such a generator ends when they do."""
    needs_template: ClassVar[bool] = False
    """Does the teacher write what a user would say, which its chat template must open?"""
    num_balanced_variants: ClassVar[int] = 0
    """Variants of which equally many rows are kept; 0: rows are kept as they come."""

    @property
    def needs_distributions(self) -> bool:
        """Must the teacher give its next-token distributions?"""
        return False

    @property
    def needs_log_probs(self) -> bool:
        """Must the teacher give the log-probability of what it writes?"""
        return False

    @property
    def samplings(self) -> Mapping[str, SamplingRecipe]:
        """How replies are drawn, by the dotted key that says so."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        answerings = {k: v for k, v in fields.items() if isinstance(v, AnsweringRecipe)}
        return {name: v for name, v in fields.items() if isinstance(v, SamplingRecipe)} | {
            f"{name}.sampling": value.sampling for name, value in answerings.items()
        }

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        """Rows that the teacher is shown or asked."""
        return seed_tasks

    @property
    def compared_sources(self) -> Sequence[SourceRecipe]:
        """Rows, besides the seed tasks, that no kept row may be too similar to."""
        return ()


class GivenPromptsSection(GeneratorSection):
    """Base of the generators whose prompts are the user's rows."""

    has_given_prompts: ClassVar[bool] = True

    prompts: Annotated[Sources, Field(min_length=1)]

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        return self.prompts


class AlpacaRecipe(GeneratorSection):
    """Whole tasks, several per call, after examples from the seed tasks."""

    RENAMED: ClassVar = {"answer": "answering"}

    kind: Literal["alpaca"] = "alpaca"
    tasks_per_call: int = Field(_alpaca.tasks_per_call, gt=0)
    """A small teacher follows a list of one better than one of many."""
    examples: int = Field(_alpaca.examples, gt=0)
    answering: AnsweringRecipe | None = _alpaca.answering
    """For small teachers, with tasks_per_call: 1.  The list gives the question alone, and the
    teacher is asked for its answer as a user would.
    """
    sampling: SamplingRecipe = SamplingRecipe(**_alpaca.sampling)
    max_new_tokens: int = Field(_alpaca.max_new_tokens, gt=0)

    @model_validator(mode="after")
    def _one_question(self) -> AlpacaRecipe:
        if self.answering is not None and self.tasks_per_call != 1:
            raise PydanticCustomError(
                "answering",
                "'answering' needs 'tasks_per_call: 1'. Set that, or remove 'answering'.",
            )
        return self


class SelfInstructRecipe(GeneratorSection):
    """Instructions first, then whether they classify, then an input and its output."""

    kind: Literal["self_instruct"] = "self_instruct"
    tasks_per_call: int = Field(_self_instruct.tasks_per_call, gt=0)
    examples: int = Field(_self_instruct.examples, gt=0)
    machine_examples: int = Field(_self_instruct.machine_examples, ge=0)
    """How many of the examples are tasks made before, once there are some."""
    sampling: SamplingRecipe = SamplingRecipe(**_self_instruct.sampling)
    max_new_tokens: int = Field(_self_instruct.max_new_tokens, gt=0)
    max_instance_tokens: int = Field(_self_instruct.max_instance_tokens, gt=0)

    @model_validator(mode="after")
    def _among_the_examples(self) -> SelfInstructRecipe:
        if self.machine_examples > self.examples:
            raise PydanticCustomError(
                "machine_examples",
                "'machine_examples' are part of 'examples' and cannot be more. Lower them, or "
                "raise 'examples'.",
            )
        return self


class MagpieRecipe(GeneratorSection):
    """The teacher writes what a user would say, then answers it."""

    RENAMED: ClassVar = {"answer": "answering"}
    needs_template: ClassVar[bool] = True

    kind: Literal["magpie"] = "magpie"
    sampling: SamplingRecipe = SamplingRecipe(**_magpie.sampling)
    """Of what the user says."""
    max_instruction_tokens: int = Field(_magpie.max_instruction_tokens, gt=0)
    answering: AnsweringRecipe = AnsweringRecipe(**_magpie.answering)

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        return ()


class AnswerRecipe(GivenPromptsSection):
    """Answers to given prompts."""

    RENAMED: ClassVar = {"answer": "answering"}

    kind: Literal["answer"] = "answer"
    samples: int = Field(_answer.samples, gt=0)
    best_by: one_of(SCORERS) | None = _answer.best_by  # type: ignore[valid-type]
    """Keep one of the samples: the one that the teacher finds likeliest (mean log-probability per
    token), that is most like the others, or most like the data set's answer (ROUGE-L).  None: all.
    """
    answering: DrawnAnsweringRecipe = DrawnAnsweringRecipe()

    @property
    def needs_log_probs(self) -> bool:
        return self.best_by == "likelihood"

    @model_validator(mode="after")
    def _several_to_choose_from(self) -> AnswerRecipe:
        if self.best_by is not None and self.samples == 1:
            raise PydanticCustomError(
                "best_by",
                "'best_by' chooses among 'samples', but there is only 1. Set more samples.",
            )
        if self.samples > 1 and self.answering.sampling.temperature == 0:
            raise PydanticCustomError(
                "samples",
                "all 'samples' are the same at temperature 0. Set 'samples: 1', or raise "
                "'answering.sampling.temperature'.",
            )
        return self


class RewriteRecipe(GivenPromptsSection):
    """Given answers in the teacher's own words; a given one stays if the new one is of no use."""

    kind: Literal["rewrite"] = "rewrite"
    result: ResultPattern | None = _rewrite.result
    """A regular expression for the result, as for maths: the last match must stay the same."""
    sampling: SamplingRecipe = SamplingRecipe(**_rewrite.sampling)
    max_new_tokens: int = Field(_rewrite.max_new_tokens, gt=0)


class EvolveRecipe(GeneratorSection):
    """Harder and rarer variants of the seed tasks, with answers."""

    RENAMED: ClassVar = {"answer": "answering"}

    kind: Literal["evolve"] = "evolve"
    sampling: SamplingRecipe = SamplingRecipe(**_evolve.sampling)
    max_instruction_tokens: int = Field(_evolve.max_instruction_tokens, gt=0)
    answering: AnsweringRecipe = AnsweringRecipe(**_evolve.answering)


class LionRecipe(GeneratorSection):
    """Variants of what is hard for a student, and of what is easy, 1:1."""

    RENAMED: ClassVar = {"answer": "answering", "by": "compare_by"}
    num_balanced_variants: ClassVar[int] = 2

    kind: Literal["lion"] = "lion"
    student: str
    """A Hub id or a folder."""
    pool: Annotated[Sources, Field(min_length=1)]
    """The tasks that are told apart."""
    compare_by: Literal["divergence", "referee"] = "divergence"
    """divergence: mean KL on the teacher's answer, for a teacher on this machine; referee: the
    teacher scores both answers.
    """
    hard_share: float = Field(0.5, gt=0, lt=1)
    """compare_by: divergence.  The share of the pool that counts as hard."""
    max_compared_tokens: int = Field(128, gt=0)
    """Of the answers that are compared."""
    sampling: SamplingRecipe = SamplingRecipe(**_lion.sampling)
    max_instruction_tokens: int = Field(_lion.max_instruction_tokens, gt=0)
    answering: AnsweringRecipe = AnsweringRecipe(**_lion.answering)

    @property
    def needs_distributions(self) -> bool:
        return self.compare_by == "divergence"

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        return self.pool

    @property
    def compared_sources(self) -> Sequence[SourceRecipe]:
        return self.pool


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
