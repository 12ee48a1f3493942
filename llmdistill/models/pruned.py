"""A model whose smallest weights count as zero for a while: magnitude pruning without a copy.

Only the linear layers of the decoder layers are pruned.  Each of them is pruned while it runs, so
that one pruned matrix is in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.layers import decoder_layers


def thresholds(model: Any, share: float) -> dict[nn.Module, float]:
    """Return the size below which a weight of each linear layer is among the smallest ones.

    `share` is the share of the smallest weights of each layer, 0 to 1 (L1, unstructured).  Raises
    ModelError for weights that are quantised or offloaded.
    """
    found = {}
    for module in decoder_layers(model).modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        if type(weight) is not nn.Parameter or weight.is_meta:
            raise ModelError(
                f"{type(model).__name__}: the weights of a {type(module).__name__} are quantised "
                "or offloaded, so they cannot be pruned. Load the model without that."
            )
        number = round(share * weight.numel())
        sizes = weight.detach().abs().flatten().float()
        found[module] = float(sizes.kthvalue(number).values) if number else -1.0
    return found


@contextlib.contextmanager
def pruned(limits: Mapping[nn.Module, float]) -> Iterator[None]:
    """Run these layers with 0 in place of the weights up to their limit, inside the context."""
    whole: dict[nn.Module, Tensor] = {}

    def cut(module: Any, _: Any) -> None:
        weight = whole[module] = module.weight.data
        module.weight.data = torch.where(weight.abs() > limits[module], weight, 0)

    def restore(module: Any, *_: Any) -> None:
        module.weight.data = whole.pop(module)

    with contextlib.ExitStack() as stack:
        for module in limits:
            stack.callback(module.register_forward_pre_hook(cut).remove)
            stack.callback(module.register_forward_hook(restore).remove)
        try:
            yield
        finally:
            for module in list(whole):  # a layer that failed while it ran
                restore(module)
