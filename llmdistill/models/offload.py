"""A model larger than its device: blocks stay in the CPU's memory and visit the device in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llmdistill.models.layers import decoder_layers, layers_replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def offload_layers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The same model, on the CPU before; embeddings, final norm and head move to `device` for good.

    Each block's weights are copied there for its own forward pass only: device memory for one
    block, at the price of moving all weights once a pass.  For models without gradients.
    """
    from accelerate import cpu_offload

    with layers_replaced(model, nn.ModuleList()):
        model.to(device)
    for block in decoder_layers(model):
        cpu_offload(block, execution_device=device, offload_buffers=True)
    return model
