"""Who judges: the teacher of a recipe.  `teachers/build.py` builds it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Tag

from llmdistill.recipe.base import Dtype, Quantization, Strict
from llmdistill.recipe.tables import needs

if TYPE_CHECKING:
    from llmdistill.recipe.schema import StudentRecipe


class Weights(NamedTuple):
    """Weights that are loaded, and in what form they are held."""

    model: str
    revision: str | None
    dtype: Dtype
    quantization: Quantization | None
    offload: bool


class TeacherSection(Strict):
    """What other code asks any teacher section."""

    kind: str

    @property
    @abstractmethod
    def provides(self) -> frozenset[str]:
        """The kinds of `Need` that the teacher can be asked for."""

    @property
    def weights(self) -> Weights | None:
        """The weights that it holds itself; None if they are the student's."""
        return None

    @abstractmethod
    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        """Name and revision of the model that teaches."""


class LocalTeacherRecipe(TeacherSection):
    """Who judges: a model on this machine."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()
    """Keys that a resumed `generate` may change."""
    is_remote: ClassVar[bool] = False
    stated_license: ClassVar[str | None] = None
    """None: its model card states the licence."""

    kind: Literal["local"] = "local"
    model: str
    """A Hub id, a folder, a .gguf file, or `smollm2-135m-instruct` (embedded)."""
    revision: str | None = None
    dtype: Dtype = "auto"
    """auto: bfloat16 if the device multiplies it natively, else float32."""
    device: str | None = None
    """None: the GPU of this process, or the CPU."""
    quantization: Quantization | None = None
    """Quantise the weights while they are read; needs the extra `quantization`."""
    offload: bool = False
    """Keep the decoder layers in the CPU's memory; each visits the GPU for its own pass."""

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
        """Name and revision of its tokenizer."""
        return self.model, self.revision

    def public(self) -> LocalTeacherRecipe:
        """The same for a card: it holds no address."""
        return self


class AdapterOffTeacherRecipe(TeacherSection):
    """Who judges: the student's own base, with the adapter of `student.peft` switched off."""

    kind: Literal["adapter_off"] = "adapter_off"

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/local.py", "LocalTeacher")

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return student.model, student.revision


def kind_or_local(given: Any) -> str:
    """The kind of a teacher: local if none is said."""
    if isinstance(given, Mapping):
        return str(given.get("kind", "local"))
    return getattr(given, "kind", "local")


TeacherRecipe = Annotated[
    Annotated[LocalTeacherRecipe, Tag("local")]
    | Annotated[AdapterOffTeacherRecipe, Tag("adapter_off")],
    Discriminator(kind_or_local),
]
