"""Who writes the tokens that the student learns on?  Builds the rollout of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmdistill import recipe
from llmdistill.protocols import Rollout
from llmdistill.rollouts.acceptance import acceptance
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.mixed import MixedRollout
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Sampling
from llmdistill.schedules import build_schedule


def build_rollout(section: recipe.RolloutRecipe) -> Rollout:
    """The rollout that a recipe asks for."""
    return _BUILDERS[type(section)](section)


def _fixed(section: recipe.FixedRecipe) -> Rollout:
    return FixedRollout()


def _sampled(section: recipe.SampledRecipe) -> Rollout:
    fields = section.model_dump(exclude={"kind", "sampling"})
    return SampledRollout(**fields, sampling=_sampling(section.sampling))


def _interleaved(section: recipe.InterleavedRecipe) -> Rollout:
    return InterleavedRollout(
        accept=acceptance(section.accept, **section.options()),
        block_size=section.block_size,
        max_new_tokens=section.max_new_tokens,
        student_sampling=_sampling(section.student_sampling),
        teacher_sampling=_sampling(section.teacher_sampling),
    )


def _mixed(section: recipe.MixedRecipe) -> Rollout:
    return MixedRollout(
        build_rollout(section.student),
        build_rollout(section.other),
        share=build_schedule(section.share),
    )


def _replay(section: recipe.ReplayRecipe) -> Rollout:
    return ReplayRollout(build_rollout(section.rollout), capacity=section.capacity)


def _sampling(section: recipe.Strict) -> Sampling:
    return Sampling(**section.model_dump())


_BUILDERS: dict[type, Callable[[Any], Rollout]] = {
    recipe.FixedRecipe: _fixed,
    recipe.SampledRecipe: _sampled,
    recipe.InterleavedRecipe: _interleaved,
    recipe.MixedRecipe: _mixed,
    recipe.ReplayRecipe: _replay,
}
