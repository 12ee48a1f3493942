"""The three questions of a recipe: who writes, who judges, what is matched.

Each answer is one class; its `kind` names it in YAML, and the folder that answers the question
builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Dtype, Quantization, Strict
from llmdistill.recipe.facts import close_to, divergence_options, wrong_option


class WarpRecipe(Strict):
    """How a token is drawn."""

    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 keeps every token."""


class SamplingRecipe(WarpRecipe):
    """How one model draws a whole answer."""

    continuous: bool = False
    """Rows join and leave the batch as they end (`generate_batch`, for GPUs); an answer then
    depends on the rows beside it.
    """


class LocalTeacherRecipe(Strict):
    """Who judges: a model on this machine."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()
    """Keys that a resumed `generate` may change."""
    is_remote: ClassVar[bool] = False
    stated_license: ClassVar[str | None] = None
    """Its model card states the licence."""

    kind: Literal["local"] = "local"
    model: str
    """A Hub id, a folder, a .gguf file, or `smollm2-135m-instruct` (embedded)."""
    revision: str | None = None
    dtype: Dtype = "auto"
    """auto: bfloat16 where the device multiplies it natively, else float32."""
    device: str | None = None
    """None: the GPU of this process, or the CPU."""
    quantization: Quantization | None = None
    """Quantise the weights while they are read; needs the extra `quantization`."""
    offload: bool = False
    """Keep the blocks in the CPU's memory; each visits the GPU for its own pass."""

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """Name and revision of its tokenizer."""
        return self.model, self.revision

    def public(self) -> LocalTeacherRecipe:
        """The same for a card: it holds no address."""
        return self


class AdapterOffTeacherRecipe(Strict):
    """Who judges: the student's own base, with the adapter of `student.peft` switched off."""

    kind: Literal["adapter_off"] = "adapter_off"


def kind_or_local(given: Any) -> str:
    """The kind of a teacher: where none is said, a local one."""
    if isinstance(given, Mapping):
        return str(given.get("kind", "local"))
    return getattr(given, "kind", "local")


TeacherRecipe = Annotated[
    Annotated[LocalTeacherRecipe, Tag("local")]
    | Annotated[AdapterOffTeacherRecipe, Tag("adapter_off")],
    Discriminator(kind_or_local),
]


class FixedRecipe(Strict):
    """Who writes: the data set."""

    kind: Literal["fixed"] = "fixed"

    @property
    def takes_data(self) -> bool:
        """Are the data set's own answers trained on?"""
        return True

    @property
    def new_tokens(self) -> int:
        """The longest answer that is written."""
        return 0


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

    @property
    def takes_data(self) -> bool:
        return False

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens


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

    @property
    def takes_data(self) -> bool:
        return False

    @property
    def new_tokens(self) -> int:
        return self.rollout.new_tokens


# What each way to accept a draft can be told, and what it takes if it is not.
ACCEPT_OPTIONS: dict[str, dict[str, float]] = {
    "top_k": {"top_k": 25},
    "top_p": {"top_p": 0.95},
    "mixture": {"teacher_share": 0.2},
    "switch": {"factor": 3.0, "window": 10},
}


class DraftRecipe(WarpRecipe):
    """How the student draws a drafted token: SKD's settings, if not said."""

    temperature: float = Field(0.5, ge=0)
    top_p: float = Field(0.5, gt=0, le=1)


class ReplaceRecipe(WarpRecipe):
    """How the teacher draws what replaces it: SKD's settings, if not said."""

    temperature: float = Field(0.2, ge=0)
    top_p: float = Field(0.5, gt=0, le=1)


class InterleavedRecipe(Strict):
    """Who writes: both; the student drafts, the teacher replaces what it does not accept (SKD)."""

    kind: Literal["interleaved"] = "interleaved"
    accept: Literal["top_k", "top_p", "mixture", "switch"] = "top_k"
    """Which drafted tokens stay.  top_k: the teacher's likeliest; top_p: those in its nucleus;
    mixture: all, but a share of the slots is the teacher's (MiniLLM); switch: all until the
    divergence jumps, then none (AdaSwitch).
    """
    top_k: int | None = Field(None, ge=0)
    """accept: top_k.  0 takes nothing from the student, the size of the vocabulary everything."""
    top_p: float | None = Field(None, gt=0, le=1)
    """accept: top_p.  The nucleus is taken at temperature 1."""
    teacher_share: float | None = Field(None, ge=0, le=1)
    """accept: mixture."""
    factor: float | None = Field(None, gt=0)
    """accept: switch.  A jump is this many times the mean of the slots before."""
    window: int | None = Field(None, gt=0)
    """accept: switch.  The slots that are compared with."""
    block_size: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Tokens drafted at a time; auto: as many as pay, measured while writing.  The answers do not
    depend on it.
    """
    max_new_tokens: int = Field(256, gt=0)
    student_sampling: DraftRecipe = DraftRecipe()
    teacher_sampling: ReplaceRecipe = ReplaceRecipe()
    """Of the tokens that replace what is not accepted."""

    @model_validator(mode="before")
    @classmethod
    def _with_the_defaults_of_its_rule(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        said = {name: value for name, value in given.items() if value is not None}
        return {**ACCEPT_OPTIONS.get(str(given.get("accept", "top_k")), {}), **said}

    @model_validator(mode="after")
    def _options_of_its_rule(self) -> InterleavedRecipe:
        for rule, options in ACCEPT_OPTIONS.items():
            for name in options:
                if rule != self.accept and getattr(self, name) is not None:
                    raise PydanticCustomError(
                        "accept",
                        "'{name}' is an option of accept: {rule}; this is accept: {accept}",
                        {"name": name, "rule": rule, "accept": self.accept},
                    )
        return self

    @property
    def takes_data(self) -> bool:
        return False

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens


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
Own = Annotated[SampledRecipe | ReplayRecipe | InterleavedRecipe, Field(discriminator="kind")]
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

    @property
    def takes_data(self) -> bool:
        return self.other.takes_data

    @property
    def new_tokens(self) -> int:
        return max(self.student.new_tokens, self.other.new_tokens)


RolloutRecipe = Annotated[
    FixedRecipe | SampledRecipe | InterleavedRecipe | MixedRecipe | ReplayRecipe,
    Field(discriminator="kind"),
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
