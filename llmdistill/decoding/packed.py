"""Faster linear layers on a CPU while a model writes.

Decoding multiplies a few rows at a time.  oneDNN does that faster if the weights are laid out in
blocks first (`torch.ops.mkldnn`, which is private and has no gradients).  So the layers are packed
once for each batch that is written, and restored afterwards.  Each dtype is tested once against
`F.linear`.  If the results differ, the model writes with its layers unchanged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextlib.contextmanager
def packed(model: nn.Module, batch_size: int) -> Iterator[None]:
    """Run the model's linear layers on a CPU packed within the context.

    Gradients must be off.  Layers on other devices, and quantised or sharded ones, are unchanged.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and _is_plain(m.weight)]
    # A layer that has `forward` as an instance attribute is packed already.
    layers = [layer for layer in layers if "forward" not in layer.__dict__]
    layers = [layer for layer in layers if _packs(_product_dtype(layer.weight))]
    # Tied layers are packed once.  The address alone is not a key: a transposed view of the same
    # memory has the same one.
    weights: dict[tuple, Tensor] = {}
    try:
        for layer in layers:
            dtype = _product_dtype(layer.weight)
            key = (layer.weight.data_ptr(), layer.weight.shape, layer.weight.stride())
            if key not in weights:
                weights[key] = _pack(layer.weight.detach().to(dtype), batch_size)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            layer.__dict__["forward"] = functools.partial(
                _packed_or_plain, layer, weight=weights[key], bias=bias, dtype=dtype
            )
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is on the CPU, and neither quantised nor sharded."""
    plain = type(weight) is nn.Parameter and not hasattr(weight, "ds_id")
    return weight.device.type == "cpu" and plain


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a layer multiplies now: autocast's, or that of its weight."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _pack(weight: Tensor, batch_size: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch_size)


def _packed_or_plain(
    layer: nn.Linear, x: Tensor, *, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Apply the packed layer, or the plain one if its dtype is not the one it was packed for."""
    # Autocast may be on here although it was off when the layer was packed.
    if _product_dtype(layer.weight) != dtype:
        return F.linear(x, layer.weight, layer.bias)
    return _linear(x, weight=weight, bias=bias, dtype=dtype)


def _linear(x: Tensor, *, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether packing works on this machine for a dtype and gives the results of `F.linear`."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).to(dtype)
    weight = torch.linspace(1, -1, 32 * 64).reshape(32, 64).to(dtype)
    try:
        found = _linear(x, weight=_pack(weight, 3), bias=None, dtype=dtype)
    except (AttributeError, RuntimeError):  # This build of torch lacks the private operators.
        return False
    return torch.allclose(found.float(), F.linear(x, weight).float(), rtol=2e-2, atol=2e-2)
