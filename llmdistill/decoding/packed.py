"""Faster linear layers on a CPU while a model writes.

Decoding multiplies a few rows at a time, and oneDNN is faster at that with weights laid out in
blocks beforehand (`torch.ops.mkldnn`, private and without gradients).  So the layers are packed
once for a whole piece of writing and put back afterwards; each kind is tried once against
`F.linear`, and where it does not give the same numbers the model writes with its layers as they
are.
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
    """Within it, the model's linear layers on a CPU run packed.  Gradients must be off."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and _is_plain(m.weight)]
    layers = [layer for layer in layers if "forward" not in layer.__dict__]  # packed already
    layers = [layer for layer in layers if _packs(_product_dtype(layer.weight))]
    weights: dict[tuple, Tensor] = {}  # tied layers are packed once
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
    """On the CPU, and neither quantised nor sharded."""
    return weight.device.type == "cpu" and type(weight) is nn.Parameter


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which this layer would multiply here: autocast's, or its own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _pack(weight: Tensor, batch_size: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch_size)


def _packed_or_plain(
    layer: nn.Linear, x: Tensor, *, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The packed layer, where products are made in the dtype that it was packed for."""
    if _product_dtype(layer.weight) != dtype:
        return F.linear(x, layer.weight, layer.bias)
    return _linear(x, weight=weight, bias=bias, dtype=dtype)


def _linear(x: Tensor, *, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Does packing work on this machine for this dtype, and give the numbers of `F.linear`?"""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).to(dtype)
    weight = torch.linspace(1, -1, 32 * 64).reshape(32, 64).to(dtype)
    try:
        found = _linear(x, weight=_pack(weight, 3), bias=None, dtype=dtype)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found.float(), F.linear(x, weight).float(), rtol=2e-2, atol=2e-2)
