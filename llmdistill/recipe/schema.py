"""The shape of a recipe: what may be said, in which words, within which bounds.

A recipe is strict (no unknown key, no silent conversion), frozen and typed; each field is
documented where it is declared.  Nothing here imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llmdistill.recipe.facts import (
    check_training_argument,
    close_to,
    divergence_options,
    wrong_option,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Strict(BaseModel):
    """Base of all recipe classes: no unknown keys, no silent conversion, no change after
    reading.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key", "", {"key": str(key), "known": list(cls.model_fields)}
                    )
        return data


class SamplingRecipe(Strict):
    """How tokens are drawn."""

    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 keeps every token."""


class LocalTeacherRecipe(Strict):
    """Who judges: a model on this machine."""

    kind: Literal["local"] = "local"
    model: str
    """A Hub id, a folder, a .gguf file, or `smollm2-135m-instruct` (embedded)."""
    revision: str | None = None
    dtype: Dtype = "auto"
    """auto: bfloat16 where the device multiplies it natively, else float32."""
    device: str | None = None


class CarveRecipe(Strict):
    """How a student is cut out of its model."""

    layers: int | list[int]
    """How many to keep, or which ones."""
    by: Literal["influence", "even"] = "influence"
    """influence: those that change the hidden states most; even: evenly spaced."""


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
    carve: CarveRecipe | None = None
    peft: PeftRecipe | None = None

    @model_validator(mode="after")
    def _an_adapter_needs_its_base(self) -> StudentRecipe:
        if self.carve and self.peft and self.peft.save == "adapter":
            raise PydanticCustomError(
                "adapter",
                "a carved base is saved nowhere, so an adapter would lack it; use save: merged",
            )
        return self


class SourceRecipe(Strict):
    """Where rows come from, and how they are read."""

    source: str
    """A .jsonl, .json, .csv, .tsv or .parquet file, a folder of such files, a data set of the Hub
    (org/name or org/name:split), or `seed_tasks`.
    """
    format: Literal["auto", "messages", "conversations", "prompt_completion", "alpaca", "text"] = (
        "auto"
    )
    columns: dict[str, str] = {}
    """Fields by other names: {instruction: question, output: answer}."""
    weight: float = Field(1.0, gt=0)
    """How often a row stands in an epoch: 2 is twice, 0.5 is half of the rows, always the same."""


class DataRecipe(Strict):
    train: list[SourceRecipe] = Field(min_length=1)
    """Sources; one of them may be given alone, and as its name."""
    eval: list[SourceRecipe] = []
    """The same, for rows that are only measured on."""
    hold_back: int = Field(0, ge=0)
    """Instead of `eval`: this many evenly spaced rows of `train` are only measured on."""
    turns: Literal["last", "all"] = "last"
    """all: every answer of a conversation is a row, after the turns before it."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the chat template: {enable_thinking: false}."""
    max_prompt_tokens: int = Field(512, gt=0)
    max_response_tokens: int = Field(1024, gt=0)
    long_prompts: Literal["drop", "stop"] = "drop"
    """Rows with a longer prompt are dropped and counted, or stop the run."""
    long_responses: Literal["cut", "drop", "stop"] = "cut"
    """Longer responses of the data set are cut, or their rows dropped, and counted; or they stop
    the run.
    """
    on_bad_row: Literal["stop", "skip"] = "stop"
    streaming: bool = False
    """Read `train` while training, in its order, without holding it in memory; needs
    training.max_steps.
    """

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        several = given if isinstance(given, list) else [given]
        return [{"source": one} if isinstance(one, str) else one for one in several]

    @model_validator(mode="after")
    def _one_source_of_eval_rows(self) -> DataRecipe:
        if self.eval and self.hold_back:
            raise PydanticCustomError("both", "give 'eval' or 'hold_back', not both")
        if self.streaming and (self.hold_back or any(s.weight != 1 for s in self.train)):
            raise PydanticCustomError(
                "streaming", "a stream has neither 'hold_back' nor weights; give 'eval', or load it"
            )
        return self


class FixedRecipe(Strict):
    """Who writes: the data set."""

    kind: Literal["fixed"] = "fixed"


class SampledRecipe(Strict):
    """Who writes: one model."""

    kind: Literal["sampled"] = "sampled"
    by: Literal["student", "teacher"] = "student"
    sampling: SamplingRecipe = SamplingRecipe()
    max_new_tokens: int = Field(256, gt=0)
    samples: int = Field(1, gt=0)
    """Answers of the teacher to each prompt, written once; epoch e trains on answer e mod
    samples.
    """

    @model_validator(mode="after")
    def _student_writes_anew(self) -> SampledRecipe:
        if self.by == "student" and self.samples != 1:
            raise PydanticCustomError(
                "samples", "'samples' is for by: teacher; a student writes anew"
            )
        return self


class ReplayRecipe(Strict):
    """Who writes: the student, less and less often; else what it wrote before is taken again."""

    kind: Literal["replay"] = "replay"
    rollout: SampledRecipe = SampledRecipe()
    capacity: int = Field(1000, gt=0)
    """Rows that are kept."""

    @model_validator(mode="after")
    def _the_student_writes(self) -> ReplayRecipe:
        if self.rollout.by == "teacher":
            raise PydanticCustomError("by", "a teacher's answers are kept anyway; use by: student")
        return self


class ConstantShareRecipe(Strict):
    kind: Literal["constant"] = "constant"
    value: float = Field(ge=0, le=1)


class LinearShareRecipe(Strict):
    """From one share to another over all steps."""

    kind: Literal["linear"] = "linear"
    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)


class AdaptiveShareRecipe(Strict):
    """DistiLLM's: the share rises when the held-out loss does."""

    kind: Literal["adaptive"] = "adaptive"
    start: float = Field(0.0, ge=0, le=1)
    rise: float = Field(0.1, gt=0, le=1)
    tolerance: float = Field(0.1, ge=0)
    """Nats by which the held-out loss must have risen."""


Schedule = Annotated[
    ConstantShareRecipe | LinearShareRecipe | AdaptiveShareRecipe, Field(discriminator="kind")
]
Own = Annotated[SampledRecipe | ReplayRecipe, Field(discriminator="kind")]
Other = Annotated[FixedRecipe | SampledRecipe, Field(discriminator="kind")]


class MixedRecipe(Strict):
    """Who writes: the student a share of the steps, another rollout the rest."""

    kind: Literal["mixed"] = "mixed"
    share: Schedule = ConstantShareRecipe(value=0.5)
    """Probability that a step is written by `student`: a number, or a schedule."""
    student: Own = SampledRecipe()
    other: Other = FixedRecipe()

    @field_validator("share", mode="before")
    @classmethod
    def _a_number_is_a_constant(cls, given: Any) -> Any:
        return (
            given if isinstance(given, Mapping | Strict) else {"kind": "constant", "value": given}
        )


RolloutRecipe = Annotated[
    FixedRecipe | SampledRecipe | MixedRecipe | ReplayRecipe, Field(discriminator="kind")
]


class ResponseRecipe(Strict):
    """What is matched: next-token distributions."""

    kind: Literal["response"] = "response"
    divergence: str = "forward_kl"
    alpha: float | None = None
    """skew_forward_kl and skew_reverse_kl: the share of the other side; alpha_beta: its first
    power.
    """
    beta: float | None = None
    """jsd: 0 is forward KL, 1 reverse KL; alpha_beta: its second power."""
    head_mass: float | None = None
    """adaptive_kl: the teacher's mass that counts as its head."""
    temperature: float = Field(1.0, gt=0)
    """Of the divergence; a sampler has its own."""
    scale_by_t2: bool = False
    """Multiply by temperature^2, which keeps the gradient's size next to a cross-entropy."""
    target: Literal["teacher"] = "teacher"
    token_weight: Literal["uniform", "sequence_mean"] = "uniform"
    weight: float = 1.0

    @field_validator("divergence")
    @classmethod
    def _known_divergence(cls, name: str) -> str:
        if name not in divergence_options():
            known = list(divergence_options())
            raise PydanticCustomError(
                "divergence",
                "should be one of {names}.{close}",
                {"names": ", ".join(known), "close": close_to(name, known)},
            )
        return name

    @field_validator("alpha", "beta", "head_mass")
    @classmethod
    def _own_option(cls, value: float | None, info: ValidationInfo) -> float | None:
        name = info.data.get("divergence")  # missing where it is itself wrong
        if name and value is not None:
            known = divergence_options()[name]
            if wrong := wrong_option(name, {str(info.field_name): value}, known):
                raise PydanticCustomError("option", "{wrong}", {"wrong": wrong})
        return value

    def options(self) -> dict[str, float]:
        """The divergence's own options that were given."""
        names = ("temperature", "alpha", "beta", "head_mass")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class CrossEntropyRecipe(Strict):
    """What is matched: the tokens themselves, where the student did not write them."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    weight: float = 1.0


ObjectiveRecipe = Annotated[ResponseRecipe | CrossEntropyRecipe, Field(discriminator="kind")]


class EvaluateRecipe(Strict):
    """How the student is measured before and after."""

    max_new_tokens: int = Field(96, gt=0)
    every_steps: int = Field(0, ge=0)
    """Also the held-out loss every so many steps; 0 is never."""


class Recipe(Strict):
    """A run of `llmdistill train`."""

    seed: int = Field(0, ge=0)
    output: str
    """The run folder."""
    teacher: LocalTeacherRecipe
    student: StudentRecipe
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
    def _an_adaptive_share_needs_its_loss(self) -> Recipe:
        share = getattr(self.rollout, "share", None)
        if isinstance(share, AdaptiveShareRecipe) and not (
            self.evaluate.every_steps and (self.data.eval or self.data.hold_back)
        ):
            raise PydanticCustomError(
                "adaptive",
                "an adaptive share follows the held-out loss: give 'evaluate.every_steps' and "
                "'data.eval' or 'data.hold_back'",
            )
        return self

    @model_validator(mode="after")
    def _a_stream_has_no_end(self) -> Recipe:
        if self.data.streaming and self.training.get("max_steps", -1) <= 0:
            raise PydanticCustomError(
                "streaming", "'data.streaming' needs 'training.max_steps': a stream has no length"
            )
        return self
