"""Finds out whether the weights of a model are spread over the ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor


def has_sharded_weights(model: nn.Module) -> bool:
    """Whether a forward pass gathers weights from other ranks (FSDP2 or ZeRO-3).

    All ranks must then make the same number of forward passes.
    """
    return any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in model.parameters())
