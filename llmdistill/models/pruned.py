"""A model whose smallest weights count as zero for a while: magnitude pruning without a copy.

The weight matrices of the decoder layers are pruned: linear layers, and the stacked matrices of
experts.  Each module is pruned while it runs, so that one pruned matrix is in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.layers import decoder_layers
from llmdistill.models.placement import is_whole

Limits = dict[nn.Module, dict[str, float]]  # of each weight matrix of a module, by its name


def thresholds(model: Any, share: float) -> Limits:
    """Return the size below which a weight of each matrix is among the smallest ones.

    `share` is the share of the smallest weights of each matrix, 0 to 1 (L1, unstructured).  Raises
    ModelError for weights that are quantised or not in one place.
    """
    found: Limits = {}
    whole = is_whole(model)
    for module in decoder_layers(model).modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2:
                continue
            if type(weight) is not nn.Parameter or not whole:
                raise ModelError(
                    f"{type(model).__name__}: the weights of a {type(module).__name__} are "
                    "quantised or not in one place, so they cannot be pruned. Load the model "
                    "without that."
                )
            number = round(share * weight.numel())
            sizes = weight.detach().abs().flatten().float()
            limit = float(sizes.kthvalue(number).values) if number else -1.0
            found.setdefault(module, {})[name] = limit
    return found


@contextlib.contextmanager
def pruned(limits: Limits) -> Iterator[None]:
    """Run these modules with 0 in place of the weights up to their limits, inside the context."""
    whole: dict[nn.Module, dict[str, Tensor]] = {}

    def cut(module: Any, _: Any) -> None:
        whole[module] = {name: getattr(module, name).data for name in limits[module]}
        for name, weight in whole[module].items():
            kept = torch.where(weight.abs() > limits[module][name], weight, 0)
            getattr(module, name).data = kept

    def restore(module: Any, *_: Any) -> None:
        for name, weight in whole.pop(module, {}).items():
            getattr(module, name).data = weight

    with contextlib.ExitStack() as stack:
        for module in limits:
            stack.callback(module.register_forward_pre_hook(cut).remove)
            stack.callback(module.register_forward_hook(restore).remove)
        try:
            yield
        finally:
            for module in list(whole):  # a module that failed while it ran
                restore(module)
