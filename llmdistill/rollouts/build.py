"""Builds the rollout of a recipe: who writes the tokens that the student learns on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmdistill.protocols import Rollout
from llmdistill.recipe import rollouts as sections
from llmdistill.recipe.sampling import WarpRecipe
from llmdistill.rollouts.acceptance import acceptance
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.mixed import MixedRollout
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Sampling
from llmdistill.schedules import build_schedule


def build_rollout(section: sections.RolloutRecipe) -> Rollout:
    """Return the rollout that a section of a recipe describes."""
    return _BUILDERS[type(section)](section)


def _fixed(section: sections.FixedRecipe) -> Rollout:
    return FixedRollout()


def _sampled(section: sections.SampledRecipe) -> Rollout:
    fields = section.model_dump(exclude={"kind", "sampling"})
    return SampledRollout(**fields, sampling=_sampling(section.sampling))


def _interleaved(section: sections.InterleavedRecipe) -> Rollout:
    return InterleavedRollout(
        accept=acceptance(section.accept, **section.options()),
        block_size=section.block_size,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
        student_sampling=_sampling(section.student_sampling),
        teacher_sampling=_sampling(section.teacher_sampling),
    )


def _mixed(section: sections.MixedRecipe) -> Rollout:
    return MixedRollout(
        build_rollout(section.student),
        build_rollout(section.other),
        share=build_schedule(section.share),
    )


def _replay(section: sections.ReplayRecipe) -> Rollout:
    return ReplayRollout(build_rollout(section.rollout), capacity=section.capacity)


def _sampling(section: WarpRecipe) -> Sampling:
    return Sampling(**section.model_dump())


# One builder for each section; a new rollout adds a line here.
_BUILDERS: dict[type, Callable[[Any], Rollout]] = {
    sections.FixedRecipe: _fixed,
    sections.SampledRecipe: _sampled,
    sections.InterleavedRecipe: _interleaved,
    sections.MixedRecipe: _mixed,
    sections.ReplayRecipe: _replay,
}
