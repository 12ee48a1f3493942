"""A Trainer whose parameters have owners: student, projectors, and a teacher that trains along.

Each owner has its own optimiser groups and its own gradient clipping.
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
from llmdistill.training.saving import StudentTrainer


class GroupedTrainer(StudentTrainer):
    """Makes the optimiser's groups, and clips, by owner."""

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Module | None = None) -> torch.optim.Optimizer:
        """One pair of groups (with and without weight decay) for each owner, named after it."""
        groups = dict(self.model.parameter_groups())
        if self.optimizer is not None or list(groups) == ["student"]:
            optimizer = super().create_optimizer(model)  # all of Trainer's optimisers
            for group in optimizer.param_groups:
                group.setdefault("name", "student")
            return optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if {"params", "model", "optimizer_dict"} & options.keys():
            raise TrainingError(
                f"training.optim: {self.args.optim} makes its own parameter groups and cannot "
                f"train {' and '.join(groups)} together; choose adamw_torch"
            )
        self.optimizer = optimizer_class(
            _optimizer_groups(groups, decayed, self.args.weight_decay), **options
        )
        return self.optimizer

    def _clip_grad_norm(self, model: Module) -> Tensor | float | None:
        """Each owner's gradient is clipped on its own: one clip would couple them.  Gives the norm
        of all.
        """
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return super()._clip_grad_norm(model)
        owners = [list(named.values()) for _, named in self.model.parameter_groups()]
        if len(owners) == 1:
            return self.accelerator.clip_grad_norm_(owners[0], self.args.max_grad_norm)
        self.accelerator.unscale_gradients()  # once: Accelerate's clipping would for each owner
        norms = [clip_grad_norm_(owned, self.args.max_grad_norm) for owned in owners]
        return torch.stack([torch.as_tensor(norm) for norm in norms]).norm()


def _optimizer_groups(
    groups: Mapping[str, Mapping[str, Parameter]], decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    return [
        {
            "params": [p for name, p in named.items() if (name in decayed) is decays],
            "weight_decay": weight_decay if decays else 0.0,
            "name": group,
        }
        for group, named in groups.items()
        for decays in (True, False)
    ]
