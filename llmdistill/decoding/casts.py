"""Autocast's copies of frozen weights, made once while a model writes.

Autocast keeps the copy that it makes of a weight if the weight needs a gradient, and makes a new
one in every pass if it does not.  The frozen base model of an adapter would then be read in float32
and written in bfloat16 for each token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Let autocast keep its copies of the model's frozen weights within the context.

    Gradients must be off.  Products are the same as without the context.  Autocast frees the copies
    when its own outermost context ends.
    """
    frozen = []
    # Offloaded weights are on no device, and have no copies that could be kept.
    kinds = {p.device.type for p in model.parameters() if not p.is_meta}
    if any(map(torch.is_autocast_enabled, kinds)):
        # Autocast copies float32 weights alone.  Quantised and sharded weights have other types.
        frozen = [
            parameter
            for parameter in model.parameters()
            if type(parameter) is nn.Parameter
            and parameter.dtype == torch.float32
            and not parameter.requires_grad
        ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        # Autocast looks up a kept copy only for a weight that needs a gradient, so a later pass
        # with gradients does not find these copies.
        for parameter in frozen:
            parameter.requires_grad_(False)
