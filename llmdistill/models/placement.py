"""Where the decoder layers of a frozen model are, if its device does not hold all of them.

Embeddings, final norm and head are on the device of the model in each placement, and so is what the
model returns.  Gradients are supported for models that are whole only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.heads import split
from llmdistill.models.layers import decoder_layers, layers_replaced
from llmdistill.models.sharding import has_sharded_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def offload_layers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Keep the decoder layers on the CPU, and copy each to the device for its own forward pass.

    The device needs memory for one layer, but all weights are copied in each forward pass.
    """
    from accelerate import cpu_offload

    _move_the_rest(model, device)
    for layer in decoder_layers(model):
        cpu_offload(layer, execution_device=device, offload_buffers=True)
    return model


def park_layers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Keep the decoder layers on the CPU, and copy them to the device for the time of a use.

    A use is the inside of `at_hand`: all the tokens of a batch that is written, or one pass that
    scores.  The device needs memory for all layers, but only then.
    """
    _move_the_rest(model, device)
    layers = decoder_layers(model)
    if device.type == "cuda":  # copies from pinned memory are several times faster
        for tensor in _tensors(layers):
            tensor.data = tensor.data.pin_memory()
    vars(model)["parked"] = _Parked(layers, device)
    return model


def spread_layers(
    model: PreTrainedModel, device: torch.device, others: list[torch.device] | None = None
) -> PreTrainedModel:
    """Spread the decoder layers over the other GPUs of this process, a part of them on each.

    Their states move from one GPU to the next.  `others` are the devices of the layers; None is all
    GPUs but that of the model.  Raises ModelError if there is none, or if several processes would
    use the same ones.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    if others is None:
        found = range(torch.accelerator.device_count())
        others = [torch.device(device.type, place) for place in found if place != device.index]
    if not others or PartialState().num_processes > 1:
        reason = "there is only one GPU" if not others else "several processes share the GPUs"
        raise ModelError(
            f"cannot spread a model: {reason}. Use another placement: sharded for several "
            "processes, or offloaded."
        )
    _move_the_rest(model, device)
    layers, backbone = decoder_layers(model), split(model)[0]
    for place, layer in enumerate(layers):
        there = others[place * len(others) // len(layers)]
        add_hook_to_module(layer.to(there), AlignDevicesHook(execution_device=there))
    for child in backbone.children():
        if child is not layers:
            add_hook_to_module(child, AlignDevicesHook(execution_device=device))
    add_hook_to_module(backbone, AlignDevicesHook(io_same_device=True))
    return model


def shard_layers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Spread the weights of each decoder layer over the ranks, with FSDP2.

    A layer is gathered for its forward pass, so all ranks must make the same number of passes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _move_the_rest(model, device)
    ranks = PartialState().num_processes
    if ranks == 1:
        return model.to(device)
    mesh, layers = init_device_mesh(device.type, (ranks,)), decoder_layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The backbone has no sharded weights of its own.  As the root it gathers the next layer while
    # one computes.
    inside = {id(parameter) for parameter in layers.parameters()}
    rest = {one for one in model.parameters() if id(one) not in inside}
    fully_shard(split(model)[0], mesh=mesh, ignored_params=rest)
    return model


Place = Callable[["PreTrainedModel", torch.device], "PreTrainedModel"]
# Each places the layers of a model that is on the CPU.
PLACEMENTS: dict[str, Place] = {
    "whole": lambda model, device: model.to(device),
    "sharded": shard_layers,
    "spread": spread_layers,
    "offloaded": offload_layers,
    "parked": park_layers,
}


def is_whole(model: nn.Module) -> bool:
    """Whether all weights of a model are on one device, and stay there."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and not has_sharded_weights(model) and not hasattr(model, "parked")


@contextlib.contextmanager
def at_hand(model: nn.Module) -> Iterator[None]:
    """Keep parked layers on the device inside the context; other models need nothing.

    Contexts can be nested.  The outermost one moves the layers.
    """
    parked = vars(model).get("parked")
    with contextlib.nullcontext() if parked is None else parked.at_hand():
        yield


class _Parked:
    """Layers on the CPU, with copies on the device while they are in use."""

    def __init__(self, layers: nn.Module, device: torch.device) -> None:
        self.layers, self.device, self.in_use = layers, device, False

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        if self.in_use:
            yield
            return
        # Frozen weights never change, so nothing is copied back.
        kept = [(tensor, tensor.data) for tensor in _tensors(self.layers)]
        self.in_use = True
        try:
            for tensor, there in kept:
                tensor.data = _copied(there, self.device)
            yield
        finally:
            for tensor, there in kept:
                tensor.data = there
            self.in_use = False


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _move_the_rest(model: PreTrainedModel, device: torch.device) -> None:
    """Move all but the decoder layers to the device."""
    with layers_replaced(model, nn.ModuleList()):
        model.to(device)
