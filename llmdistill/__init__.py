"""Distil causal language models: a Hugging Face teacher in, a smaller Hugging Face student out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# `X as X` tells type checkers that a name is exported.
if TYPE_CHECKING:
    from llmdistill.errors import LlmDistillError as LlmDistillError
    from llmdistill.models.load import load_model as load_model
    from llmdistill.objectives.features import HiddenObjective as HiddenObjective
    from llmdistill.objectives.response import CrossEntropyObjective as CrossEntropyObjective
    from llmdistill.objectives.response import ResponseObjective as ResponseObjective
    from llmdistill.publish.hub import push as push
    from llmdistill.recipe.reading import load_recipe as load_recipe
    from llmdistill.rollouts.fixed import FixedRollout as FixedRollout
    from llmdistill.rollouts.interleaved import InterleavedRollout as InterleavedRollout
    from llmdistill.rollouts.mixed import MixedRollout as MixedRollout
    from llmdistill.rollouts.sampled import SampledRollout as SampledRollout
    from llmdistill.run import distill as distill
    from llmdistill.sampling import Sampling as Sampling
    from llmdistill.teachers.local import LocalTeacher as LocalTeacher
    from llmdistill.training.trainer import DistillTrainer as DistillTrainer

__version__ = "0.1.0"

# Public names and their modules.  Each is imported when it is first used, so that importing the
# package does not import torch: reading a recipe and `--help` must be fast.
_PUBLIC = {
    "CrossEntropyObjective": "llmdistill.objectives.response",
    "DistillTrainer": "llmdistill.training.trainer",
    "FixedRollout": "llmdistill.rollouts.fixed",
    "HiddenObjective": "llmdistill.objectives.features",
    "InterleavedRollout": "llmdistill.rollouts.interleaved",
    "LlmDistillError": "llmdistill.errors",
    "LocalTeacher": "llmdistill.teachers.local",
    "MixedRollout": "llmdistill.rollouts.mixed",
    "ResponseObjective": "llmdistill.objectives.response",
    "SampledRollout": "llmdistill.rollouts.sampled",
    "Sampling": "llmdistill.sampling",
    "distill": "llmdistill.run",
    "load_model": "llmdistill.models.load",
    "load_recipe": "llmdistill.recipe.reading",
    "push": "llmdistill.publish.hub",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llmdistill' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
