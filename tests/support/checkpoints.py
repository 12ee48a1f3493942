"""A short run that has everything a checkpoint can contain, and its resumes."""

from __future__ import annotations

import torch

from llmdistill.objectives.response import ResponseObjective
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from tests import toy
from tests.support.objectives import Projected
from tests.support.spies import spy
from tests.training.helpers import trainer, weights

STEPS = 4


def made(folder, **options):
    torch.manual_seed(7)
    defaults = {
        "rollout": ReplayRollout(SampledRollout("student", max_new_tokens=4), capacity=4),
        "objectives": [ResponseObjective(), Projected()],
        "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear",
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "rows": toy.rows(10),
    }  # fmt: skip
    return trainer(folder, **defaults | options)


def resumed(folder, newest=True, *, first=3, **options):
    """Resume a run, whose first step must be `first`; return the weights at its end."""
    run = made(folder, **options)
    steps = spy(run, "_save_checkpoint")
    run.train(resume_from_checkpoint=newest)
    assert len(steps) == STEPS + 1 - first, "it did not start where it should"
    return weights(run.model)
