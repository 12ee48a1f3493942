"""Who writes the tokens that the student learns on?  Builds the rollout of a recipe."""

from __future__ import annotations

from collections.abc import Callable

from llmdistill import recipe
from llmdistill.protocols import Rollout
from llmdistill.rollouts.acceptance import Accept, Mixture, Switch, TopK, TopP
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.mixed import MixedRollout
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.rollouts.schedules import AdaptiveShare, LinearShare, Share
from llmdistill.sampling import Sampling


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


def _interleaved(answer: recipe.InterleavedRecipe) -> Rollout:
    options = recipe.ACCEPT_OPTIONS[answer.accept]
    return InterleavedRollout(
        accept=_ACCEPT[answer.accept](*(getattr(answer, name) for name in options)),
        block_size=answer.block_size,
        max_new_tokens=answer.max_new_tokens,
        student_sampling=Sampling(**answer.student_sampling.model_dump()),
        teacher_sampling=Sampling(**answer.teacher_sampling.model_dump()),
    )


def _mixed(answer: recipe.MixedRecipe) -> Rollout:
    return MixedRollout(
        build_rollout(answer.student), build_rollout(answer.other), share=_share(answer.share)
    )


def _replay(answer: recipe.ReplayRecipe) -> Rollout:
    return ReplayRollout(build_rollout(answer.rollout), capacity=answer.capacity)


def _share(answer: recipe.Schedule) -> float | Share:
    if isinstance(answer, recipe.ConstantShareRecipe):
        return answer.value
    return _SCHEDULES[type(answer)](**answer.model_dump(exclude={"kind"}))


_SCHEDULES: dict[type, Callable[..., Share]] = {
    recipe.LinearShareRecipe: LinearShare,
    recipe.AdaptiveShareRecipe: AdaptiveShare,
}


_ACCEPT: dict[str, Callable[..., Accept]] = {
    "top_k": TopK,
    "top_p": TopP,
    "mixture": Mixture,
    "switch": Switch,
}

_BUILDERS: dict[type, Callable[..., Rollout]] = {
    recipe.FixedRecipe: _fixed,
    recipe.SampledRecipe: _sampled,
    recipe.InterleavedRecipe: _interleaved,
    recipe.MixedRecipe: _mixed,
    recipe.ReplayRecipe: _replay,
}
