"""Generators: one section for each way in which a teacher makes tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.answering import AnsweringRecipe, DrawnAnsweringRecipe
from llmdistill.recipe.base import Strict
from llmdistill.recipe.filters import ResultPattern
from llmdistill.recipe.sampling import WritingRecipe
from llmdistill.recipe.sources import SourceRecipe, Sources
from llmdistill.recipe.tables import Table, defaults, one_of

SCORERS = Table("instruct/scorers.py", "SCORERS")

EVOLUTIONS = Table("instruct/generators/variants.py", "EVOLUTIONS")

_alpaca = defaults("instruct/generators/lists.py", "Alpaca")
_self_instruct = defaults("instruct/generators/lists.py", "SelfInstruct")
_answer = defaults("instruct/generators/given.py", "Answer")
_rewrite = defaults("instruct/generators/given.py", "Rewrite")
_magpie = defaults("instruct/generators/variants.py", "Magpie")
_evolve = defaults("instruct/generators/variants.py", "Evolve")
_lion = defaults("instruct/generators/variants.py", "Lion")


class GeneratorSection(Strict):
    """Base of all generator sections: the properties that other code may use."""

    kind: str

    has_given_prompts: ClassVar[bool] = False
    """Whether the prompts are the user's rows.  Such a generator ends when all are answered."""
    needs_template: ClassVar[bool] = False
    """Whether the teacher writes the user's turn, which its chat template must open."""
    takes_images: ClassVar[bool] = False
    """Whether the prompts can come with images."""
    num_balanced_variants: ClassVar[int] = 0
    """Number of variants that share the kept rows equally; 0 if rows are kept as they come."""

    @property
    def ends_by_itself(self) -> bool:
        """Whether the generator has a limited number of calls."""
        return self.has_given_prompts

    @property
    def shows_kept_rows(self) -> bool:
        """Whether the teacher is shown rows that were kept before."""
        return False

    @property
    def answers(self) -> bool:
        """Whether the rows have answers, and are not questions alone."""
        return getattr(self, "answering", True) is not None

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answers, if they have one."""
        answering = getattr(self, "answering", None)
        return answering.json_schema if answering else None

    @property
    def needs_distributions(self) -> bool:
        """Whether the teacher must provide next-token distributions."""
        return False

    @property
    def needs_log_probs(self) -> bool:
        """Whether the teacher must return the log-probability of its replies."""
        return False

    @property
    def samplings(self) -> Mapping[str, WritingRecipe]:
        """Sampling settings by their dotted key."""
        # Found by type, so that a new generator's settings are checked without listing them here.
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        answerings = {k: v for k, v in fields.items() if isinstance(v, AnsweringRecipe)}
        return {name: v for name, v in fields.items() if isinstance(v, WritingRecipe)} | {
            f"{name}.sampling": value.sampling for name, value in answerings.items()
        }

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        """Return the sources of the rows that the teacher is shown or asked."""
        return seed_tasks

    @property
    def compared_sources(self) -> Sequence[SourceRecipe]:
        """Sources of rows, in addition to the seed tasks, that no kept row may be similar to."""
        return ()


class GivenPromptsSection(GeneratorSection):
    """Base of the generators whose prompts are the user's rows."""

    has_given_prompts: ClassVar[bool] = True

    prompts: Annotated[Sources, Field(min_length=1)]
    """Rows with the prompts: a source or a list of sources."""

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        return self.prompts


class AlpacaRecipe(GeneratorSection):
    """Let the teacher continue a list of example tasks with whole new tasks (Alpaca)."""

    RENAMED: ClassVar = {"answer": "answering"}

    kind: Literal["alpaca"] = "alpaca"
    tasks_per_call: int = Field(_alpaca.tasks_per_call, gt=0)
    """Number of new tasks that one call asks for.  Small teachers keep the format best at `1`."""
    examples: int = Field(_alpaca.examples, gt=0)
    """Number of seed tasks that each call shows."""
    answering: AnsweringRecipe | None = _alpaca.answering
    """How the teacher answers a new question in a separate request.  `null` takes the answer from
    the list.  Set it for small teachers; it needs `tasks_per_call: 1`.
    """
    sampling: WritingRecipe = WritingRecipe(**_alpaca.sampling)
    """How the list is sampled."""
    max_new_tokens: int = Field(_alpaca.max_new_tokens, gt=0)
    """Length at which the list is cut off, in tokens."""

    @property
    def answers(self) -> bool:
        return True  # the list has answers, too

    @model_validator(mode="after")
    def _one_question(self) -> AlpacaRecipe:
        if self.answering is not None and self.tasks_per_call != 1:
            raise PydanticCustomError(
                "answering",
                "'answering' needs 'tasks_per_call: 1'. Set that, or remove 'answering'.",
            )
        return self


class SelfInstructRecipe(GeneratorSection):
    """Let the teacher write a list of instructions, then decide for each whether it is a
    classification, then write an input and an output for it (Self-Instruct).
    """

    kind: Literal["self_instruct"] = "self_instruct"
    tasks_per_call: int = Field(_self_instruct.tasks_per_call, gt=0)
    """Largest number of new instructions that are taken from one list."""
    instances: int = Field(_self_instruct.instances, gt=0)
    """Largest number of instances (an input and its output) of each instruction.  Instances with
    the same input and different outputs are dropped.
    """
    examples: int = Field(_self_instruct.examples, gt=0)
    """Number of example instructions that each call shows."""
    machine_examples: int = Field(_self_instruct.machine_examples, ge=0)
    """Number of the examples that are generated tasks, as soon as some were kept.  The others are
    seed tasks.
    """
    only_classification: bool = _self_instruct.only_classification
    """Show only seed tasks that are classifications: those whose field `is_classification` is true.
    """
    sampling: WritingRecipe = WritingRecipe(**_self_instruct.sampling)
    """How the list of instructions is sampled.  The other replies are greedy."""
    max_new_tokens: int = Field(_self_instruct.max_new_tokens, gt=0)
    """Length at which the list of instructions is cut off, in tokens."""
    max_instance_tokens: int = Field(_self_instruct.max_instance_tokens, gt=0)
    """Length at which the reply with inputs and outputs is cut off, in tokens."""

    @property
    def shows_kept_rows(self) -> bool:
        return self.machine_examples > 0

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
    """Let the teacher write the user's turn of a conversation, then answer it (Magpie).  It needs
    no seed tasks and works with small teachers.
    """

    RENAMED: ClassVar = {"answer": "answering"}
    needs_template: ClassVar[bool] = True

    kind: Literal["magpie"] = "magpie"
    sampling: WritingRecipe = WritingRecipe(**_magpie.sampling)
    """How the user's turn is sampled."""
    max_instruction_tokens: int = Field(_magpie.max_instruction_tokens, gt=0)
    """Length limit of a new instruction, in tokens.  Longer ones are dropped."""
    turns: int = Field(_magpie.turns, gt=0)
    """Number of questions in a conversation, each with its answer.  A conversation ends early if a
    further question or answer cannot be used.
    """
    one_line: bool = _magpie.one_line
    """End a question at its first line end, as the authors of Magpie do.  Fewer questions are cut
    off, but none has several lines.
    """
    answering: AnsweringRecipe | None = AnsweringRecipe(**_magpie.answering)
    """How the teacher answers the new instruction.  `null` makes questions alone."""

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        return ()  # the teacher is shown nothing but the opening of a turn

    @model_validator(mode="after")
    def _turns_have_answers(self) -> MagpieRecipe:
        if self.turns > 1 and self.answering is None:
            raise PydanticCustomError(
                "turns",
                "several 'turns' need answers between the questions. Set 'answering' or 'turns: "
                "1'.",
            )
        return self


class AnswerRecipe(GivenPromptsSection):
    """Let the teacher answer given prompts."""

    RENAMED: ClassVar = {"answer": "answering"}

    takes_images: ClassVar[bool] = True
    kind: Literal["answer"] = "answer"
    samples: int = Field(_answer.samples, gt=0)
    """Number of answers to each prompt."""
    best_by: one_of(SCORERS) | None = _answer.best_by  # type: ignore[valid-type]
    """Which one of the `samples` to keep: `likelihood` takes the highest mean log-probability per
    token, `consensus` the highest ROUGE-L to the other samples, `reference` the highest ROUGE-L to
    the answer of the row, and `judge` the highest score by the judge.  `null` keeps all samples.
    """
    pairs: bool = _answer.pairs
    """Make pairs of preferences, for DPO: each row has the best sample as `chosen` and the worst
    one as `rejected`.  It needs `best_by`.
    """
    answering: DrawnAnsweringRecipe = DrawnAnsweringRecipe()
    """How the teacher answers a prompt."""

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
        if self.pairs and self.best_by is None:
            raise PydanticCustomError(
                "pairs",
                "'pairs' are a better and a worse sample, which needs an order of the samples. Set "
                "'best_by', for example to 'judge'.",
            )
        if self.samples > 1 and self.answering.sampling.temperature == 0:
            raise PydanticCustomError(
                "samples",
                "all 'samples' are the same at temperature 0. Set 'samples: 1', or raise "
                "'answering.sampling.temperature'.",
            )
        return self


class RewriteRecipe(GivenPromptsSection):
    """Let the teacher rewrite given answers in its own words (SDFT).  The given answer is kept if
    the new one is empty, cut off, a refusal or talk about the task.
    """

    kind: Literal["rewrite"] = "rewrite"
    result: ResultPattern | None = _rewrite.result
    """Regular expression that finds the result of an answer, for maths.  A new answer with another
    result is not used.  `null` compares no results.
    """
    sampling: WritingRecipe = WritingRecipe(**_rewrite.sampling)
    """How the new answer is sampled."""
    max_new_tokens: int = Field(_rewrite.max_new_tokens, gt=0)
    """Length at which a new answer is cut off, in tokens."""


class EvolveRecipe(GeneratorSection):
    """Let the teacher write harder, rarer and other variants of the seed tasks, and answer them."""

    RENAMED: ClassVar = {"answer": "answering"}

    kind: Literal["evolve"] = "evolve"
    ways: list[one_of(EVOLUTIONS)] = list(_evolve.ways)  # type: ignore[valid-type]
    """How tasks are changed, in turn: `harder`, `rarer`, `constrained` (one more constraint),
    `deeper`, `concrete` (specific things in place of general ones) or `reasoning` (several steps).
    """
    own_ways: dict[str, str] | None = _evolve.own_ways
    """More ways, as `{name: prompt}`.  `{task}` in a prompt stands for the task."""
    steps: int = Field(_evolve.steps, gt=0)
    """Number of times that a task is changed, each time in the next way.  If a step fails, the
    result of the one before it is used.
    """
    sampling: WritingRecipe = WritingRecipe(**_evolve.sampling)
    """How a new instruction is sampled."""
    max_instruction_tokens: int = Field(_evolve.max_instruction_tokens, gt=0)
    """Length limit of a new instruction, in tokens.  Longer ones are dropped."""
    answering: AnsweringRecipe | None = AnsweringRecipe(**_evolve.answering)
    """How the teacher answers the new instruction.  `null` makes questions alone."""

    @model_validator(mode="after")
    def _ways_with_a_task(self) -> EvolveRecipe:
        if not self.ways and not self.own_ways:
            raise PydanticCustomError("ways", "set at least one way in 'ways' or 'own_ways'")
        for name, prompt in (self.own_ways or {}).items():
            if "{task}" not in prompt:
                raise PydanticCustomError(
                    "own_ways",
                    "the prompt of the way '{name}' does not show the task. Write {task} where "
                    "the task belongs.",
                    {"name": name},
                )
        return self


class LionRecipe(GeneratorSection):
    """Let the teacher write variants of the tasks that are hard for a student, and equally many of
    easy ones, and answer them (Lion).
    """

    RENAMED: ClassVar = {"answer": "answering", "by": "compare_by"}
    num_balanced_variants: ClassVar[int] = 2

    kind: Literal["lion"] = "lion"
    student: str
    """Hub id or folder of the student that the tasks are measured with."""
    pool: Annotated[Sources, Field(min_length=1)]
    """Tasks that are sorted into hard and easy ones: a source or a list of sources."""
    compare_by: Literal["divergence", "referee"] = "divergence"
    """How tasks are sorted.  `divergence` measures the student's mean KL divergence on the answer
    of the teacher, which must be of kind `local`.  `referee` lets the teacher score both answers.
    """
    hard_share: float = Field(0.5, gt=0, lt=1)
    """Share of the pool that counts as hard, with `compare_by: divergence`."""
    max_compared_tokens: int = Field(128, gt=0)
    """Length at which the compared answers are cut off, in tokens."""
    sampling: WritingRecipe = WritingRecipe(**_lion.sampling)
    """How a new instruction is sampled."""
    max_instruction_tokens: int = Field(_lion.max_instruction_tokens, gt=0)
    """Length limit of a new instruction, in tokens.  Longer ones are dropped."""
    answering: AnsweringRecipe | None = AnsweringRecipe(**_lion.answering)
    """How the teacher answers the new instruction.  `null` makes questions alone."""

    @property
    def needs_distributions(self) -> bool:
        return self.compare_by == "divergence"

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        return self.pool

    # A new task must not repeat the one that it is a variant of.
    @property
    def compared_sources(self) -> Sequence[SourceRecipe]:
        return self.pool


class PythonGeneratorRecipe(GeneratorSection):
    """Make tasks with a function of your own: `docs/extending.md` has an example."""

    kind: Literal["python"] = "python"
    function: str
    """The function (or subclass of `TaskGenerator`), as `path/to/file.py:name`."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""
    calls: int | None = Field(None, gt=0)
    """Number of calls.  `null` calls the function until `target` is reached."""

    @property
    def ends_by_itself(self) -> bool:
        return self.calls is not None

    @property
    def shows_kept_rows(self) -> bool:
        return True  # the function is given them, and may use them

    def sources(self, seed_tasks: Sequence[SourceRecipe]) -> Sequence[SourceRecipe]:
        return ()  # whatever the function shows the teacher comes from its file


GeneratorRecipe = Annotated[
    LionRecipe
    | PythonGeneratorRecipe
    | AlpacaRecipe
    | SelfInstructRecipe
    | MagpieRecipe
    | AnswerRecipe
    | RewriteRecipe
    | EvolveRecipe,
    Field(discriminator="kind"),
]
