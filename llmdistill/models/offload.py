"""Run a model that is larger than its device, with its decoder layers in the CPU's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llmdistill.models.layers import decoder_layers, layers_replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def offload_layers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Offload the decoder layers of a model on the CPU, and return the model.

    Embeddings, final norm and head move to `device` and stay there.  The weights of a decoder layer
    are copied to the device only for its own forward pass.  The device therefore needs memory for
    one layer, but all weights are copied in each forward pass.  Gradients are not supported.
    """
    from accelerate import cpu_offload

    # Without its layers, `to` moves the rest of the model.
    with layers_replaced(model, nn.ModuleList()):
        model.to(device)
    for block in decoder_layers(model):
        cpu_offload(block, execution_device=device, offload_buffers=True)
    return model
