"""Builds the objectives of a recipe: what is matched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmdistill.objectives.augment import (
    AdversarialObjective,
    AugmentedObjective,
    MixObjective,
    TokenDropoutObjective,
)
from llmdistill.objectives.base import Objective
from llmdistill.objectives.ckd import CkdObjective
from llmdistill.objectives.contrastive import CrdObjective, IcdObjective, RrdObjective
from llmdistill.objectives.correlation import CorrelationObjective, DistObjective
from llmdistill.objectives.embed_distill import EmbedDistillObjective
from llmdistill.objectives.exits import ExitsObjective
from llmdistill.objectives.features import CkaObjective, HiddenObjective
from llmdistill.objectives.minilm import MiniLMObjective
from llmdistill.objectives.relations import (
    FlowObjective,
    PktObjective,
    RkdObjective,
    SimilarityObjective,
)
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.objectives.rtk import RtkObjective
from llmdistill.recipe import augments, contrasts
from llmdistill.recipe import objectives as sections
from llmdistill.schedules import Schedule, build_schedule


def build_objectives(recipe: Sequence[sections.ObjectiveRecipe]) -> list[Objective]:
    """Return the objectives that the sections of a recipe describe; a section may make several."""
    built: list[Objective] = []
    for section in recipe:
        made = _BUILDERS[type(section)](section, build_schedule(section.weight))
        built += [made] if isinstance(made, Objective) else made
    return built


def _response(section: sections.ResponseRecipe, weight: float | Schedule) -> Objective:
    return ResponseObjective(
        section.divergence,
        target=section.target,
        token_weight=section.token_weight,
        weight=weight,
        scale_by_t2=section.scale_by_t2,
        **section.options(),
    )


def _flow(section: sections.FlowRecipe, weight: float | Schedule) -> list[Objective]:
    shared = section.model_dump(exclude={"kind", "weight", "inner_weight"})
    inner = build_schedule(section.inner_weight)
    return [
        FlowObjective("inner", weight=inner, **shared),
        FlowObjective("last", weight=weight, **shared),
    ]


def _wrapping(objective: Callable[..., AugmentedObjective]) -> Callable[..., Objective]:
    """Return a builder for an objective around the one of its section `of`."""

    def build(section: augments.AugmentedRecipe, weight: float | Schedule) -> Objective:
        (inner,) = build_objectives([section.of])
        return objective(
            inner, weight=weight, **section.model_dump(exclude={"kind", "weight", "of"})
        )

    return build


def _plain(objective: Callable[..., Objective]) -> Callable[..., Objective]:
    """Return a builder for an objective whose parameters are the fields of its section."""
    return lambda section, weight: objective(
        weight=weight, **section.model_dump(exclude={"kind", "weight"})
    )


# One builder for each section; a new objective adds a line here.
_BUILDERS: dict[type, Callable[..., Objective | list[Objective]]] = {
    sections.ResponseRecipe: _response,
    sections.CrossEntropyRecipe: _plain(CrossEntropyObjective),
    sections.HiddenRecipe: _plain(HiddenObjective),
    sections.CkaRecipe: _plain(CkaObjective),
    sections.RtkRecipe: _plain(RtkObjective),
    sections.EmbedDistillRecipe: _plain(EmbedDistillObjective),
    sections.MiniLMRecipe: _plain(MiniLMObjective),
    sections.RkdRecipe: _plain(RkdObjective),
    sections.SimilarityRecipe: _plain(SimilarityObjective),
    sections.PktRecipe: _plain(PktObjective),
    sections.FlowRecipe: _flow,
    contrasts.CrdRecipe: _plain(CrdObjective),
    contrasts.IcdRecipe: _plain(IcdObjective),
    contrasts.RrdRecipe: _plain(RrdObjective),
    sections.ExitsRecipe: _plain(ExitsObjective),
    sections.CkdRecipe: _plain(CkdObjective),
    sections.DistRecipe: _plain(DistObjective),
    sections.CorrelationRecipe: _plain(CorrelationObjective),
    augments.MixRecipe: _wrapping(MixObjective),
    augments.AdversarialRecipe: _wrapping(AdversarialObjective),
    augments.TokenDropoutRecipe: _wrapping(TokenDropoutObjective),
}
