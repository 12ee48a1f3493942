"""The recipe of `llmdistill train`: its keys, their types and bounds, and what must fit together.

A recipe is strict (no unknown keys, no silent conversion), frozen and typed.  Each field is
documented where it is declared, in words for users of YAML: the reference of all keys is made from
these docstrings.  Nothing here imports torch or transformers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Folder, Seed, Strict, TemplateOptions
from llmdistill.recipe.facts import check_training_argument, wrong_pattern
from llmdistill.recipe.fits import unfit_teacher
from llmdistill.recipe.generation import GenerationRecipe
from llmdistill.recipe.objectives import ObjectiveRecipe, ResponseRecipe
from llmdistill.recipe.rollouts import FixedRecipe, RolloutRecipe
from llmdistill.recipe.sources import FORMATS, Sources
from llmdistill.recipe.students import CarveRecipe as CarveRecipe
from llmdistill.recipe.students import PeftRecipe as PeftRecipe
from llmdistill.recipe.students import StudentRecipe as StudentRecipe
from llmdistill.recipe.tables import defaults, one_of
from llmdistill.recipe.teacher_groups import TeacherRecipe
from llmdistill.recipe.teachers import LocalTeacherRecipe

_rules = defaults("data/validate.py", "Rules")


class DataRecipe(Strict):
    """The rows to train on and to measure on, and how they become tokens."""

    train: Annotated[Sources, Field(min_length=1)]
    """Rows to train on: a source or a list of sources."""
    eval: Sources = []
    """Held-out rows, which the student is only measured on: a source or a list of sources."""
    hold_back: int = Field(0, ge=0)
    """Number of rows of `train` that are held out, of evenly spaced questions, if there is no
    `eval`.  Rows with the same prompt stay together, so a few more can be held out.  `0` holds out
    none.
    """
    format: one_of(FORMATS, "auto") = "auto"  # type: ignore[valid-type]
    """Layout of the rows of sources that set no `format`.  `auto` detects it from the fields of
    each row.
    """
    turns: Literal["last", "all"] = "last"
    """Answers of a conversation to train on: `last` takes the last one, `all` makes a row of each
    answer, with the turns before it as the prompt.
    """
    chat_template_kwargs: TemplateOptions = {}
    """Options for the chat template, such as `{enable_thinking: false}`."""
    max_prompt_tokens: int = Field(512, gt=0)
    """Longest prompt in tokens, chat template included."""
    max_response_tokens: int = Field(1024, gt=0)
    """Longest response of the dataset in tokens, end token included.  Responses that a model writes
    are limited by `max_new_tokens` of the rollout.
    """
    long_prompts: Literal["drop", "stop"] = _rules.long_prompts
    """What happens to rows whose prompt is too long: `drop` drops and counts them, `stop` stops the
    run.
    """
    long_responses: Literal["cut", "drop", "stop"] = _rules.long_responses
    """What happens to rows whose response is too long: `cut` shortens the response, `drop` drops
    the row, and both count it; `stop` stops the run.
    """
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What happens to malformed rows: `stop` reports them and stops the run, `skip` skips and
    counts them.
    """
    streaming: bool = False
    """Read `train` during training, in its order and without loading it into memory, for datasets
    that are too large.  It needs `training.max_steps`, and works with neither `hold_back` nor
    weights of sources.
    """

    @model_validator(mode="after")
    def _one_source_of_eval_rows(self) -> DataRecipe:
        if self.eval and self.hold_back:
            raise PydanticCustomError(
                "both", "set 'eval' or 'hold_back', not both (data.hold_back=0 turns it off)"
            )
        # Rows are held out one by one, after conversations have been split into turns.
        if self.hold_back and self.turns == "all":
            raise PydanticCustomError(
                "turns",
                "'hold_back' cannot be combined with 'turns: all': a held-out turn would appear as "
                "context in a training row. Use 'eval'.",
            )
        # `hold_back` spaces its rows evenly, which needs the number of rows.  A stream has none.
        if self.streaming and (self.hold_back or any(s.weight != 1 for s in self.train)):
            raise PydanticCustomError(
                "streaming",
                "'streaming' cannot be combined with 'hold_back' or with weights of sources. Use "
                "'eval' and no weights, or set 'streaming: false'.",
            )
        return self


def _by_name(given: Any) -> Any:
    return {"model": given} if isinstance(given, str) else given


class EvaluateRecipe(Strict):
    """How the student is measured on held-out rows, before, during and after training."""

    max_new_tokens: int = Field(96, gt=0)
    """Length at which the answers of teacher and student are cut off, in tokens."""
    answer_pattern: str | None = None
    """Regular expression that finds the result in an answer, for the figure `exact_match`.  The
    last match is the result, or its group if the pattern has one.  `null` leaves the figure out.
    """
    every_steps: int = Field(0, ge=0)
    """Number of optimizer steps between measurements of the held-out loss, which is taken on the
    teacher's answers.  `0` does not measure it during training.
    """
    samples_every: int = Field(0, ge=0)
    """Number of optimizer steps between sample responses: the student answers the first three
    held-out prompts, in the log and in `samples.jsonl` of the run folder.  `0` writes none.
    """
    against: Annotated[LocalTeacherRecipe | None, BeforeValidator(_by_name)] = None
    """Model that the student is measured against: a teacher of kind `local`, or its name alone.
    `null` is the teacher.  It is needed for a teacher that changes during the run.  Objectives on
    inner states still compare with the teacher in the held-out loss.
    """
    patience: int | None = Field(None, gt=0)
    """Number of measurements without a lower held-out loss after which training stops.  The best
    student is exported.  `null` trains to the end and exports the last student.  It needs
    `every_steps`.
    """

    @model_validator(mode="after")
    def _patience_needs_a_loss(self) -> EvaluateRecipe:
        if self.patience is not None and not self.every_steps:
            raise PydanticCustomError(
                "patience",
                "'patience' needs 'every_steps'. Set how often the held-out loss is measured.",
            )
        return self

    @field_validator("answer_pattern")
    @classmethod
    def _a_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None and (wrong := wrong_pattern(pattern)):
            raise PydanticCustomError("pattern", "{wrong}", {"wrong": wrong})
        return pattern


class Recipe(Strict):
    """A recipe of `llmdistill train`: it trains a student to match a teacher."""

    seed: Seed = 0
    """Seed of everything random: sampling, the order of rows, and new weights."""
    output: Folder
    """Run folder, with checkpoints, figures and the trained student."""
    teacher: TeacherRecipe
    """Model or models that the student learns from.  `docs/teachers.md` describes each kind."""
    student: StudentRecipe
    """Model that is trained."""
    generate: GenerationRecipe | None = None
    """Dataset to generate before training, as a recipe of `llmdistill generate`.  An incomplete
    dataset is continued, and a complete one is used as it is.  Set `data.train` to its `output`.
    `null` generates nothing.
    """
    data: DataRecipe
    """Rows to train on and to measure on."""
    rollout: RolloutRecipe = FixedRecipe()
    """Where the tokens come from that the student learns on: the dataset, the teacher, the student,
    or a mixture.
    """
    objectives: list[ObjectiveRecipe] = Field([ResponseRecipe()], min_length=1)
    """What the student matches.  The loss is the weighted sum of the objectives."""
    training: dict[str, Any] = {}
    """Fields of `transformers.TrainingArguments`, such as `learning_rate` and `max_steps`.  Fields
    that llmdistill sets itself are refused.
    """
    evaluate: EvaluateRecipe = EvaluateRecipe()
    """How the student is measured on held-out rows."""

    @field_validator("training")
    @classmethod
    def _training_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key, value in given.items():
            check_training_argument(key, value)
        return given

    @model_validator(mode="after")
    def _what_follows_the_loss_has_one(self) -> Recipe:
        follows = self.rollout.follows_the_loss or self.evaluate.patience is not None
        # `eval_on_start` is the one field of `training` that measures without `every_steps`.
        measures = self.evaluate.every_steps or self.training.get("eval_on_start")
        measures = measures or self.evaluate.samples_every
        if measures and not (self.data.eval or self.data.hold_back):
            raise PydanticCustomError(
                "held_out", "measuring during training needs 'data.eval' or 'data.hold_back'"
            )
        if follows and not (self.evaluate.every_steps and (self.data.eval or self.data.hold_back)):
            raise PydanticCustomError(
                "held_out",
                "an adaptive share and 'evaluate.patience' depend on the held-out loss. Set "
                "'evaluate.every_steps', and either 'data.eval' or 'data.hold_back'.",
            )
        return self

    @property
    def teacher_source(self) -> tuple[str, str | None]:
        """Name and revision of the teacher's model on the Hub, or its folder."""
        return self.teacher.source(self.student)

    @property
    def teacher_sources(self) -> tuple[tuple[str, str | None], ...]:
        """Name and revision of each model that teaches."""
        return self.teacher.sources(self.student)

    @property
    def stages(self) -> list[Recipe]:
        """The recipes of the runs that this one consists of; most recipes are one run."""
        return self.teacher.stages(self)

    # The held-out loss uses the final weights of the objectives, so that its values can be compared
    # over a run in which the weights change.
    @model_validator(mode="after")
    def _a_held_out_loss_is_not_zero(self) -> Recipe:
        if self.evaluate.every_steps and all(one.ends_at_zero for one in self.objectives):
            raise PydanticCustomError(
                "weight",
                "'evaluate.every_steps' measures the objectives with their final weights, which "
                "are all 0. Let at least one weight end above 0.",
            )
        return self

    @model_validator(mode="after")
    def _something_is_learned(self) -> Recipe:
        if all(one.is_never_used for one in self.objectives):
            raise PydanticCustomError(
                "weight",
                "the weights of all objectives are 0, so nothing would be learned. Let at least "
                "one be above 0.",
            )
        return self

    @model_validator(mode="after")
    def _the_teacher_fits(self) -> Recipe:
        if wrong := unfit_teacher(self):
            raise PydanticCustomError("teacher", "{wrong}", {"wrong": wrong})
        return self

    @model_validator(mode="after")
    def _a_stream_has_no_end(self) -> Recipe:
        if self.data.streaming and self.training.get("max_steps", -1) <= 0:
            raise PydanticCustomError(
                "streaming",
                "'data.streaming' needs 'training.max_steps', because the length of a stream is "
                "unknown.",
            )
        # Grouping by length needs the lengths of all rows before the first step.
        if self.data.streaming and self.training.get("train_sampling_strategy"):
            raise PydanticCustomError(
                "streaming",
                "a stream is read in its own order. Remove 'training.train_sampling_strategy'.",
            )
        if self.data.streaming and self.training.get("dataloader_num_workers"):
            raise PydanticCustomError(
                "streaming",
                "with 'data.streaming' each worker would read the whole stream. Leave "
                "'training.dataloader_num_workers' at 0.",
            )
        return self

    # With patience `run.training_arguments` sets `save_steps` to `every_steps`: a student that was
    # measured but not saved could not be exported as the best one.
    @model_validator(mode="after")
    def _the_best_is_saved(self) -> Recipe:
        every = self.evaluate.every_steps
        if self.evaluate.patience and self.training.get("save_steps", every) != every:
            raise PydanticCustomError(
                "patience",
                "with 'evaluate.patience' a checkpoint is saved at each measurement. Remove "
                "'training.save_steps'.",
            )
        return self
