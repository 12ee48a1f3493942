"""Teachers of a recipe that consist of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.self_teachers import (
    AdapterOffTeacherRecipe,
    BornAgainTeacherRecipe,
    ChainTeacherRecipe,
    ReflexiveTeacherRecipe,
)
from llmdistill.recipe.students import StudentRecipe
from llmdistill.recipe.tables import Table, defaults, needs, one_of
from llmdistill.recipe.teachers import (
    DIVERGENCES,
    LocalTeacherRecipe,
    MultimodalTeacherRecipe,
    OnlineTeacherRecipe,
    PrunedTeacherRecipe,
    Reads,
    TeacherSection,
    Weights,
    kind_or_local,
)

if TYPE_CHECKING:
    from llmdistill.recipe.schema import Recipe

MIXES = Table("teachers/ensemble.py", "MIXES")
WEIGH = Table("teachers/ensemble.py", "WEIGH")
_ensemble = defaults("teachers/ensemble.py", "EnsembleTeacher")
_curriculum = defaults("teachers/routed.py", "CurriculumTeacher")
_mutual = defaults("teachers/mutual.py", "MutualTeacher")


def wrong_ensemble(
    number: int, mix: str, weigh: str, weights: Sequence[float] | None
) -> str | None:
    """Return what is wrong with the options of an ensemble of `number` teachers, or None."""
    if number == 0:
        return "there are no teachers. List at least one."
    if weigh not in WEIGH.entries:
        return f"unknown 'weigh' '{weigh}'. Use one of {', '.join(WEIGH.entries)}."
    if weights is not None and weigh != "fixed":
        return f"'weights' are fixed, but 'weigh' is {weigh}. Set one of them only."
    if weights is not None and len(weights) != number:
        return f"there are {len(weights)} 'weights' for {number} teachers. Give one for each."
    if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
        return f"'weights' are {list(weights)}. They must be 0 or more, and one must be above 0."
    if mix == "sum" and weigh == "confidence":
        return (
            "'mix: sum' needs weights that do not depend on the token. Use 'weigh: fixed' or "
            "'likelihood'."
        )
    return None


class NamedTeacherRecipe(LocalTeacherRecipe):
    """One of several teachers, with a name."""

    name: str
    """Name of the teacher, by which rows are routed to it."""


class SeveralTeachers(TeacherSection):
    """Base of the sections that load several frozen teachers."""

    teachers: list[LocalTeacherRecipe] = Field(min_length=1)
    """Teachers with one vocabulary, each with the keys of kind `local`.  With `placement: parked`
    only the teacher that runs has its layers on the GPU.
    """
    steps: ClassVar[bool] = False

    @property
    def has_final_states(self) -> bool:
        return False

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/ensemble.py", "EnsembleTeacher")

    @property
    def models(self) -> tuple[Weights, ...]:
        return tuple(weights for one in self.teachers for weights in one.models)

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return self.teachers[0].source(student)

    def paired(self, student: StudentRecipe) -> tuple[tuple[str, str | None], ...]:
        return self.sources(student)


class EnsembleTeacherRecipe(SeveralTeachers):
    """Several teachers that are combined into one at each token.  A teacher with weight 0 does not
    run.  The student is measured against the teacher with the largest weight.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {"mix": MIXES, "weigh": WEIGH}

    kind: Literal["ensemble"] = "ensemble"
    mix: one_of(MIXES) = _ensemble.mix  # type: ignore[valid-type]
    """How the teachers are combined: `mixture` is the mean of their probabilities, `geometric` the
    mean of their logits, and `sum` the sum of the losses against each of them.
    """
    weigh: one_of(WEIGH) = _ensemble.weigh  # type: ignore[valid-type]
    """What the weights depend on: `fixed` uses `weights`, `confidence` gives more weight to a
    teacher that is certain of the next token, and `likelihood` to one to which the response of the
    row is likely.
    """
    weights: list[float] | None = None
    """Weight of each teacher, for `weigh: fixed`.  They are divided by their sum.  `null` counts
    all the same.
    """
    weight_temperature: float = Field(_ensemble.weight_temperature, gt=0)
    """Temperature of the weights of `confidence` and `likelihood`.  A high one makes them equal."""
    writes: ClassVar[bool] = False

    @property
    def has_final_states(self) -> bool:
        return self.mix == "geometric" and self.weigh == "fixed"

    @property
    def gives_several_targets(self) -> bool:
        return self.mix == "sum"

    @property
    def reads_changes(self) -> bool:
        return all(one.reads_changes for one in self.teachers)

    @property
    def who(self) -> str:
        return f"an ensemble ({self.mix}, weights by {self.weigh})"

    @model_validator(mode="after")
    def _its_keys_fit(self) -> EnsembleTeacherRecipe:
        if wrong := wrong_ensemble(len(self.teachers), self.mix, self.weigh, self.weights):
            raise PydanticCustomError("ensemble", "{wrong}", {"wrong": wrong})
        return self

    def misfit(self, recipe: Recipe) -> str | None:
        if self.weigh == "likelihood" and (
            recipe.rollout.new_tokens or not recipe.rollout.takes_data
        ):
            return (
                "'weigh: likelihood' weighs teachers by the likelihood of the dataset's responses, "
                "but other responses are trained on. Use 'rollout: {kind: fixed}' or 'weigh: "
                "confidence'."
            )
        return None


class RouteTeacherRecipe(SeveralTeachers):
    """Several teachers, one of which teaches each row: the one that a column of the row names."""

    depends_on_rows: ClassVar[bool] = True

    kind: Literal["route"] = "route"
    teachers: list[NamedTeacherRecipe] = Field(min_length=1)  # type: ignore[assignment]
    """Teachers with one vocabulary, each with a `name` and the keys of kind `local`.  A teacher
    runs on its own rows only.
    """
    column: str
    """Column of the rows with the name of the teacher, in the held-out rows, too."""
    token_balance: bool = False
    """Multiply the losses so that each teacher counts the same, however many tokens its rows have.
    If a model writes the responses, rows are counted instead of tokens.
    """

    @property
    def reads(self) -> Reads:
        return Reads(columns=(self.column,))

    @property
    def gives_several_targets(self) -> bool:
        return self.token_balance

    @property
    def who(self) -> str:
        return f"one teacher for each row, by its column {self.column}"

    @model_validator(mode="after")
    def _names_differ(self) -> RouteTeacherRecipe:
        names = [one.name for one in self.teachers]
        if len(set(names)) < len(names):
            raise PydanticCustomError("route", "two 'teachers' have the same name. Rename one.")
        return self


class CurriculumTeacherRecipe(SeveralTeachers):
    """Experts of increasing size: the smallest teaches easy rows, the largest hard ones (CES-KD).
    A row is as hard as its response is unlikely to the largest expert, which reads all rows before
    training.  The student is measured against the largest expert.
    """

    depends_on_rows: ClassVar[bool] = True

    kind: Literal["curriculum"] = "curriculum"
    teachers: list[LocalTeacherRecipe] = Field(min_length=1)
    """Experts with one vocabulary, from the smallest to the largest, each with the keys of kind
    `local`.
    """
    pace_from: float = Field(_curriculum.pace_from, gt=0, le=1)
    """Share of the rows, the easiest ones, that are drawn at the start of training.  It grows
    evenly to all rows at the end.  `1` draws all rows from the start.
    """

    @property
    def reads(self) -> Reads:
        return Reads()

    @property
    def who(self) -> str:
        return "a curriculum of experts, the largest for the hardest rows (CES-KD)"

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return self.teachers[-1].source(student)

    def misfit(self, recipe: Recipe) -> str | None:
        if not recipe.rollout.takes_data:
            return (
                "a curriculum measures how hard the dataset's responses are, but they are not "
                "trained on. Use 'rollout: {kind: fixed}'."
            )
        if self.pace_from < 1 and recipe.training.get("train_sampling_strategy"):
            return (
                "'pace_from' below 1 chooses the order of the rows. Remove "
                "'training.train_sampling_strategy'."
            )
        return None


class MutualTeacherRecipe(TeacherSection):
    """Students that teach each other (deep mutual learning).  `student` learns from the mean of the
    `peers`, and each peer from the mean of all others.  All are exported: `student`, and
    `peers/1` and so on.
    """

    kind: Literal["mutual"] = "mutual"
    peers: list[StudentRecipe] = Field(min_length=1)
    """The other students, each with the keys of `student` but without `peft`."""
    divergence: one_of(DIVERGENCES) = _mutual.divergence  # type: ignore[valid-type]
    """Divergence of a peer from the mean of the others.  That of `student` is in `objectives`."""
    temperature: float = Field(_mutual.temperature, gt=0)
    """Temperature of this divergence, which is multiplied by its square."""
    ce_weight: float = Field(_mutual.ce_weight, ge=0)
    """Factor of the labels' cross-entropy in a peer's loss.  The divergence has factor 1."""
    writes: ClassVar[bool] = False
    steps: ClassVar[bool] = False
    is_reference: ClassVar[bool] = False

    @property
    def has_final_states(self) -> bool:
        return False

    @property
    def provides(self) -> frozenset[str]:
        return needs("teachers/mutual.py", "MutualTeacher")

    @property
    def reads_changes(self) -> bool:
        return True

    @property
    def students(self) -> tuple[StudentRecipe, ...]:
        return tuple(self.peers)

    @property
    def trains(self) -> str:
        return f"{len(self.peers)} more student{'s' * (len(self.peers) > 1)}, with all weights"

    @property
    def who(self) -> str:
        return "the mean of the other students (deep mutual learning)"

    def source(self, student: StudentRecipe) -> tuple[str, str | None]:
        return self.peers[0].model, self.peers[0].revision

    def sources(self, student: StudentRecipe) -> tuple[tuple[str, str | None], ...]:
        return tuple((one.model, one.revision) for one in self.peers)

    def paired(self, student: StudentRecipe) -> tuple[tuple[str, str | None], ...]:
        return self.sources(student)

    def misfit(self, recipe: Recipe) -> str | None:
        if all(one == recipe.student for one in self.peers):
            return (
                "all peers start as the student does, so they would stay equal and teach each "
                "other nothing. Use another model, or carve them differently."
            )
        return None

    @model_validator(mode="after")
    def _whole_weights(self) -> MutualTeacherRecipe:
        if any(one.peft or one.quantization for one in self.peers):
            raise PydanticCustomError(
                "mutual", "peers are trained with all weights. Remove 'peft' and 'quantization'."
            )
        return self


TeacherRecipe = Annotated[
    Annotated[LocalTeacherRecipe, Tag("local")]
    | Annotated[PrunedTeacherRecipe, Tag("pruned")]
    | Annotated[AdapterOffTeacherRecipe, Tag("adapter_off")]
    | Annotated[OnlineTeacherRecipe, Tag("online")]
    | Annotated[MultimodalTeacherRecipe, Tag("multimodal")]
    | Annotated[ReflexiveTeacherRecipe, Tag("reflexive")]
    | Annotated[EnsembleTeacherRecipe, Tag("ensemble")]
    | Annotated[RouteTeacherRecipe, Tag("route")]
    | Annotated[CurriculumTeacherRecipe, Tag("curriculum")]
    | Annotated[MutualTeacherRecipe, Tag("mutual")]
    | Annotated[ChainTeacherRecipe, Tag("chain")]
    | Annotated[BornAgainTeacherRecipe, Tag("born_again")],
    Discriminator(kind_or_local),
]
