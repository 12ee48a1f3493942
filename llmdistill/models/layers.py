"""Find and replace the decoder layers of a causal language model."""

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
    """Return the decoder layers of a model.

    Raises ModelError if its backbone does not have exactly one list of them.
    """
    backbone, name = _place(model)
    return getattr(backbone, name)


@contextlib.contextmanager
def layers_replaced(model: PreTrainedModel, others: nn.ModuleList) -> Iterator[None]:
    """Replace the decoder layers of a model inside the context, and restore them afterwards."""
    backbone, name = _place(model)
    own = getattr(backbone, name)
    setattr(backbone, name, others)
    try:
        yield
    finally:
        setattr(backbone, name, own)


def _place(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """Return the backbone and the name of its list of decoder layers.

    The name is "layers" in most families, and "h" in GPT-2.
    """
    backbone, _ = split(model)
    # Found by type, so that a new family needs no entry here.
    names = [name for name, child in backbone.named_children() if isinstance(child, nn.ModuleList)]
    if len(names) != 1:
        raise ModelError(
            f"{type(backbone).__name__} has {len(names)} lists of decoder layers, but carving, "
            "offloading and matching inner states need exactly one. Use another model."
        )
    return backbone, names[0]
