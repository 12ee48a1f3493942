"""The shape of a recipe: what may be said, in which words, within which bounds.

A recipe is strict (no unknown key, no silent conversion), frozen and typed; each field is
documented where it is declared.  Nothing here imports torch or transformers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Dtype, Quantization, Strict
from llmdistill.recipe.facts import check_training_argument, wrong_pattern
from llmdistill.recipe.generation import GenerationRecipe
from llmdistill.recipe.objectives import ObjectiveRecipe, ResponseRecipe
from llmdistill.recipe.rollouts import FixedRecipe, RolloutRecipe
from llmdistill.recipe.sources import FORMATS, Sources
from llmdistill.recipe.tables import defaults, one_of
from llmdistill.recipe.teachers import TeacherRecipe

_plan = defaults("models/carve.py", "Plan")
_rules = defaults("data/validate.py", "Rules")


class CarveRecipe(Strict):
    """How a student is cut out of its model; what is not named stays whole."""

    layers: int | list[int] | None = None
    """How many to keep, or which ones."""
    by: Literal["influence", "even"] = _plan.by
    """influence: those that change the hidden states most; even: evenly spaced."""
    mlp_width: int | None = Field(None, gt=0)
    """Neurons to keep in each MLP: the most active ones."""
    heads: int | None = Field(None, gt=0)
    """Attention heads to keep in each layer: the most active ones."""

    @model_validator(mode="after")
    def _something_is_cut(self) -> CarveRecipe:
        if self.layers is None and self.mlp_width is None and self.heads is None:
            raise PydanticCustomError("carve", "set 'layers', 'mlp_width' or 'heads'")
        return self


class PeftRecipe(Strict):
    """Train a LoRA adapter and leave the student's own weights as they are."""

    r: int = Field(16, gt=0)
    """Rank."""
    alpha: float = Field(32.0, gt=0)
    """The change is scaled by alpha / r."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of linear layers, such as [q_proj, v_proj]; all-linear: all but the head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    save: Literal["merged", "adapter"] = "merged"
    """merged: the student is exported as a plain model; adapter: as the adapter alone."""


class StudentRecipe(Strict):
    model: str
    revision: str | None = None
    dtype: Dtype = "float32"
    """Master weights; `training.bf16` sets the dtype of products.  With `peft` the base may be
    bfloat16.
    """
    quantization: Quantization | None = None
    """Of the frozen base under `peft`; needs the extra `quantization`."""
    carve: CarveRecipe | None = None
    peft: PeftRecipe | None = None

    @model_validator(mode="after")
    def _an_adapter_needs_its_base(self) -> StudentRecipe:
        if self.carve and self.peft and self.peft.save == "adapter":
            raise PydanticCustomError(
                "adapter",
                "the carved base model is not saved, so an adapter alone could not be loaded. Use "
                "'save: merged'.",
            )
        if self.quantization and (self.carve or self.peft is None or self.peft.save != "adapter"):
            raise PydanticCustomError(
                "quantization",
                "quantised weights cannot be trained, carved or merged with an adapter. Use 'peft' "
                "with 'save: adapter' and no 'carve', or remove 'quantization'.",
            )
        return self


class DataRecipe(Strict):
    train: Annotated[Sources, Field(min_length=1)]
    """Sources; one of them may be given alone, and as its name."""
    eval: Sources = []
    """The same, for rows that are only measured on."""
    hold_back: int = Field(0, ge=0)
    """Instead of `eval`: this many evenly spaced rows of `train` are only measured on."""
    format: one_of(FORMATS, "auto") = "auto"  # type: ignore[valid-type]
    """How rows are laid out if a source does not say it itself; auto: told by their fields."""
    turns: Literal["last", "all"] = "last"
    """all: every answer of a conversation is a row, after the turns before it."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the chat template: {enable_thinking: false}."""
    max_prompt_tokens: int = Field(512, gt=0)
    max_response_tokens: int = Field(1024, gt=0)
    long_prompts: Literal["drop", "stop"] = _rules.long_prompts
    """Rows with a longer prompt are dropped and counted, or stop the run."""
    long_responses: Literal["cut", "drop", "stop"] = _rules.long_responses
    """Longer responses of the data set are cut, or their rows dropped, and counted; or they stop
    the run.
    """
    on_bad_row: Literal["stop", "skip"] = "stop"
    streaming: bool = False
    """Read `train` while training, in its order, without holding it in memory; needs
    training.max_steps.
    """

    @model_validator(mode="after")
    def _one_source_of_eval_rows(self) -> DataRecipe:
        if self.eval and self.hold_back:
            raise PydanticCustomError(
                "both", "set 'eval' or 'hold_back', not both (data.hold_back=0 turns it off)"
            )
        if self.hold_back and self.turns == "all":
            raise PydanticCustomError(
                "turns",
                "'hold_back' cannot be combined with 'turns: all': a held-out turn would appear as "
                "context in a training row. Use 'eval'.",
            )
        if self.streaming and (self.hold_back or any(s.weight != 1 for s in self.train)):
            raise PydanticCustomError(
                "streaming",
                "'streaming' cannot be combined with 'hold_back' or with weights of sources. Use "
                "'eval' and no weights, or set 'streaming: false'.",
            )
        return self


class EvaluateRecipe(Strict):
    """How the student is measured before and after."""

    max_new_tokens: int = Field(96, gt=0)
    answer_pattern: str | None = None
    """A regular expression for the result in an answer: the last match counts, by its group."""
    every_steps: int = Field(0, ge=0)
    """Also the held-out loss every so many steps; 0 is never."""
    patience: int | None = Field(None, gt=0)
    """Stop when so many of these have brought no lower loss, and keep the best student."""

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
    """A run of `llmdistill train`."""

    seed: int = Field(0, ge=0)
    output: str
    """The run folder."""
    teacher: TeacherRecipe
    student: StudentRecipe
    generate: GenerationRecipe | None = None
    """A data set that is made first, or gone on with where it is there; `data` names its files."""
    data: DataRecipe
    rollout: RolloutRecipe = FixedRecipe()
    objectives: list[ObjectiveRecipe] = Field([ResponseRecipe()], min_length=1)
    training: dict[str, Any] = {}
    """transformers.TrainingArguments."""
    evaluate: EvaluateRecipe = EvaluateRecipe()

    @field_validator("training")
    @classmethod
    def _training_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key, value in given.items():
            check_training_argument(key, value)
        return given

    @model_validator(mode="after")
    def _what_follows_the_loss_has_one(self) -> Recipe:
        follows = self.rollout.follows_the_loss or self.evaluate.patience is not None
        measures = self.evaluate.every_steps or self.training.get("eval_on_start")
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
        """Name and revision of the teacher's model."""
        return self.teacher.source(self.student)

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
    def _the_teacher_provides_it(self) -> Recipe:
        for place, objective in enumerate(self.objectives):
            if missing := objective.teacher_needs - self.teacher.provides:
                raise PydanticCustomError(
                    "needs",
                    "objectives[{place}] of kind {objective} needs {missing} from the teacher, but "
                    "a teacher of kind {teacher} provides {provides}. Use another teacher, or "
                    "remove the objective.",
                    {
                        "place": place,
                        "objective": objective.kind,
                        "missing": ", ".join(sorted(missing)),
                        "teacher": self.teacher.kind,
                        "provides": ", ".join(sorted(self.teacher.provides)) or "nothing",
                    },
                )
        return self

    @model_validator(mode="after")
    def _a_base_is_whole(self) -> Recipe:
        whole = self.student.peft is not None and self.student.carve is None
        if self.teacher.weights is None and not whole:
            raise PydanticCustomError(
                "adapter_off",
                "a teacher of kind {kind} is the base model under the student's adapter. Set "
                "'student.peft' and remove 'student.carve', or use a teacher of kind local.",
                {"kind": self.teacher.kind},
            )
        return self

    @model_validator(mode="after")
    def _a_stream_has_no_end(self) -> Recipe:
        if self.data.streaming and self.training.get("max_steps", -1) <= 0:
            raise PydanticCustomError(
                "streaming",
                "'data.streaming' needs 'training.max_steps', because the length of a stream is "
                "unknown.",
            )
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
