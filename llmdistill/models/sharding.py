"""Models whose weights are spread over the ranks, which gather them for each forward pass."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor


def has_sharded_weights(model: nn.Module | None) -> bool:
    """Whether a forward pass gathers weights from other ranks (FSDP2 or ZeRO-3).

    All ranks must then make the same number of forward passes.  None has no weights.
    """
    return model is not None and any(
        isinstance(one, DTensor) or hasattr(one, "ds_id") for one in model.parameters()
    )


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Let transformers load models whole inside the context, also under ZeRO-3.

    It would otherwise load each model in parts, a frozen teacher, too.  Trainer spreads the student
    later.
    """
    from transformers.integrations import deepspeed

    config, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def largest(number: int) -> int:
    """Return the largest of the numbers that the ranks give; all of them must call it."""
    state = PartialState()
    if state.num_processes == 1:
        return number
    highest = torch.tensor(number, device=state.device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return int(highest)


def whole(tensor: Any) -> Any:
    """Return a tensor that is spread over the ranks as a plain one, and anything else as it is.

    All ranks must call it.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unshard(module: nn.Module) -> None:
    """Gather the weights outside the layers again, if a backward pass has let FSDP2 spread them.

    FSDP2 does it at the end of each backward pass, also of one within a forward pass.
    """
    if isinstance(module, FSDPModule):
        module.unshard()


def register_head(distillation: Any) -> None:
    """Let ZeRO-3 gather the weight of the student's head, which is used outside its own module."""
    weight = distillation.get_output_embeddings().weight
    if hasattr(weight, "ds_id"):
        zero = importlib.import_module("deepspeed.runtime.zero")
        zero.register_external_parameter(distillation, weight)


def settle_precision(accelerator: Accelerator) -> None:
    """Let FSDP2 keep losses, scales and the sums of gradients in float32.

    Weights are gathered, and hidden states computed, in bfloat16.  Accelerate's policy would round
    each input and output of the step, the loss and the scale of the gradient among them, and add up
    the gradients of the ranks in bfloat16.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(
            policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
