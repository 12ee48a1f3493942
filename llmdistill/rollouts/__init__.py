"""Who writes the tokens that the student learns on?"""

from __future__ import annotations

from collections.abc import Callable

from llmdistill import recipe
from llmdistill.batch import Rollout, Sampling
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.mixed import MixedRollout
from llmdistill.rollouts.sampled import SampledRollout


def build_rollout(answer: recipe.RolloutRecipe) -> Rollout:
    """The rollout that a recipe asks for."""
    return _BUILDERS[type(answer)](answer)


def _fixed(answer: recipe.FixedRecipe) -> Rollout:
    return FixedRollout()


def _sampled(answer: recipe.SampledRecipe) -> Rollout:
    return SampledRollout(
        answer.by,
        sampling=Sampling(**answer.sampling.model_dump()),
        max_new_tokens=answer.max_new_tokens,
        samples=answer.samples,
    )


def _mixed(answer: recipe.MixedRecipe) -> Rollout:
    return MixedRollout(
        build_rollout(answer.student), build_rollout(answer.other), share=answer.share
    )


_BUILDERS: dict[type, Callable[..., Rollout]] = {
    recipe.FixedRecipe: _fixed,
    recipe.SampledRecipe: _sampled,
    recipe.MixedRecipe: _mixed,
}
