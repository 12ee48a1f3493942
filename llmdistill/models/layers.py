"""The decoder layers of a causal LM."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from llmdistill.errors import ModelError
from llmdistill.models.heads import split

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Raises ModelError for a backbone that has not exactly one list of decoder layers."""
    backbone, name = _place(model)
    return getattr(backbone, name)


@contextlib.contextmanager
def layers_replaced(model: PreTrainedModel, others: nn.ModuleList) -> Iterator[None]:
    """The model with other decoder layers while it lasts."""
    backbone, name = _place(model)
    own = getattr(backbone, name)
    setattr(backbone, name, others)
    try:
        yield
    finally:
        setattr(backbone, name, own)


def _place(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The backbone and where its decoder layers are: `layers` in most families, `h` in GPT-2's."""
    backbone, _ = split(model)
    names = [name for name, child in backbone.named_children() if isinstance(child, nn.ModuleList)]
    if len(names) != 1:
        raise ModelError(
            f"{type(backbone).__name__} has {len(names)} lists of decoder layers, but carving, "
            "offloading and matching inner states need exactly one. Use another model."
        )
    return backbone, names[0]
