"""A Trainer with separate parameter groups for student, projectors and a trainable teacher.

Each of these owners of parameters has its own optimizer groups and its own gradient clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils import clip_grad_norm_

from llmdistill.errors import TrainingError
from llmdistill.training.resuming import ResumingTrainer


class GroupedTrainer(ResumingTrainer):
    """ResumingTrainer with optimizer groups and gradient clipping for each owner."""

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Module | None = None) -> torch.optim.Optimizer:
        """Create one pair of groups (with and without weight decay) for each owner.

        Each group is named after its owner: `student`, `projectors` or `teacher`.  Objectives with
        a learning rate for their projectors have a pair of groups for it.  Raises TrainingError if
        there are several owners and `optim` builds its own groups.
        """
        groups = dict(self.model.parameter_groups())
        if self.optimizer is not None or list(groups) == ["student"]:
            # One owner needs no grouping, so every optimizer that Trainer knows can train it.
            optimizer = super().create_optimizer(model)
            for group in optimizer.param_groups:
                group.setdefault("name", "student")
            return optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        # Trainer passes one of these to optimizers that group parameters themselves.
        if {"params", "model", "optimizer_dict"} & options.keys():
            raise TrainingError(
                f"training.optim: {self.args.optim} makes its own parameter groups and cannot "
                f"train {' and '.join(groups)} together. Use adamw_torch."
            )
        rates = self.model.learning_rates
        self.optimizer = optimizer_class(
            _optimizer_groups(groups, decayed, self.args.weight_decay, rates), **options
        )
        return self.optimizer

    def _clip_grad_norm(self, model: Module) -> Tensor | float | None:
        """Clip each owner's gradient by its own norm; return the norm of all of them together.

        With one norm a large gradient of a projector would shrink the student's update.
        """
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # DeepSpeed clips internally, by one norm over all parameters.
            return super()._clip_grad_norm(model)
        owners = [list(named.values()) for _, named in self.model.parameter_groups()]
        if len(owners) == 1:
            return self.accelerator.clip_grad_norm_(owners[0], self.args.max_grad_norm)
        # float16's scaler refuses to unscale twice in a step.  Accelerate's clipping would unscale
        # for each owner, so torch's clips here.
        self.accelerator.unscale_gradients()
        norms = [clip_grad_norm_(owned, self.args.max_grad_norm) for owned in owners]
        return torch.stack([torch.as_tensor(norm) for norm in norms]).norm()


def _optimizer_groups(
    groups: Mapping[str, Mapping[str, Parameter]],
    decayed: set[str],
    weight_decay: float,
    rates: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return two groups for each owner and each learning rate of its parameters.

    `decayed` are the names that get weight decay.  `rates` are the learning rates of the names that
    do not have the run's.
    """
    found = []
    for owner, named in groups.items():
        for rate in dict.fromkeys(rates.get(name) for name in named):
            own = {} if rate is None else {"lr": rate}
            some = {name: p for name, p in named.items() if rates.get(name) == rate}
            for decays in (True, False):
                parameters = [p for name, p in some.items() if (name in decayed) is decays]
                decay = weight_decay if decays else 0.0
                found.append({"params": parameters, "weight_decay": decay, "name": owner, **own})
    return found
