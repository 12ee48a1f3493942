"""What the sections of objectives share: their base classes, and the tables that they name.

`recipe/objectives.py` has the sections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.schedules import ScheduleSection, Weight
from llmdistill.recipe.tables import Table, defaults, one_of

LAYER_MAPS = Table("objectives/layer_maps.py", "LAYER_MAPS")
POOLS = Table("objectives/samples.py", "POOLS")
_objective = defaults("objectives/base.py", "Objective")
_states = defaults("objectives/states.py", "StateObjective")
_samples = defaults("objectives/samples.py", "PooledObjective")

Layers: Any = Annotated[
    Annotated[one_of(LAYER_MAPS), Tag("name")]
    | Annotated[
        list[Annotated[list[int], Field(min_length=2, max_length=2)]],
        Field(min_length=1),
        Tag("pairs"),
    ],
    Discriminator(lambda given: "name" if isinstance(given, str) else "pairs"),
]
"""A layer map by name, or a list of pairs [student's layer, teacher's layer]."""


class ObjectiveSection(Strict):
    """Base of all objective sections: the properties that other code may use."""

    kind: str
    weight: Weight = _objective.weight
    """Factor of the objective's mean in the loss: a number, or a schedule over the run.  Change it
    to balance several objectives.
    """

    @property
    def teacher_needs(self) -> frozenset[str]:
        """Kinds of `Need` that the objective asks of the teacher."""
        return frozenset()

    needs_final_states: ClassVar[bool] = False
    """Whether the teacher's distribution must follow from its final states by linear maps."""
    sums_targets: ClassVar[bool] = False
    """Whether the objective can be summed over several distributions for each token."""

    @property
    def changes_inputs(self) -> bool:
        """Whether the teacher must read changed embeddings."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether the teacher must be differentiated by what it reads."""
        return False

    @property
    def makes_the_student(self) -> bool:
        """Whether a part of the objective is exported as the student."""
        return False

    @property
    def is_never_used(self) -> bool:
        """Whether the weight is 0 in each step."""
        return is_always_zero(self.weight)

    @property
    def ends_at_zero(self) -> bool:
        """Whether the weight is 0 at the end of a run."""
        return is_zero_at_end(self.weight)


def is_always_zero(weight: float | ScheduleSection) -> bool:
    """Whether a weight is 0 in each step."""
    return not isinstance(weight, ScheduleSection) and weight == 0


def is_zero_at_end(weight: float | ScheduleSection) -> bool:
    # `last` is None for a schedule that adapts, and None == 0 is False.
    return (weight.last if isinstance(weight, ScheduleSection) else weight) == 0


def one_above_zero(section: ObjectiveSection, *factors: str) -> None:
    """Refuse a section whose factors are all 0, because it would train nothing."""
    if not any(getattr(section, factor) for factor in factors):
        raise PydanticCustomError(
            "factors",
            "{names} are both 0, so the objective would train nothing. Raise one of them, or "
            "remove the objective.",
            {"names": " and ".join(f"'{factor}'" for factor in factors)},
        )


class OnDistributions(ObjectiveSection):
    """Base of the sections that compare distributions."""

    @property
    def teacher_needs(self) -> frozenset[str]:
        return frozenset({"distribution"})


class OnStates(ObjectiveSection):
    """Base of the sections that compare inner states of both models."""

    layers: Layers = [list(pair) for pair in _states.layers]
    """Layers that are compared, as pairs `[student, teacher]`.  Layers are counted from 1; `0` is
    the embeddings and `-1` the last layer.  `last` pairs all layers of the student with as many
    last layers of the teacher, `skip` with every k-th layer, `uniform` with layers at the same
    relative depth, and `carved` with the layers that the student was carved from.
    """

    @property
    def teacher_needs(self) -> frozenset[str]:
        return frozenset({"hidden"})


class WithProjectors(OnStates):
    """Base of the sections whose objectives have trained parameters."""

    projector_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the projectors.  `null` is that of the student.  Both follow the same
    schedule.
    """


class OnSamples(OnStates):
    """Base of the sections that compare the responses of a batch with each other."""

    CHOICES: ClassVar[Mapping[str, Table]] = {"pool": POOLS}

    pool: one_of(POOLS) = _samples.pool  # type: ignore[valid-type]
    """How the states of a response become one vector: `mean` takes their mean, `last` the state
    that predicts the last token.
    """
