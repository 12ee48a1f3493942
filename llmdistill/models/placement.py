"""Where the decoder layers of a frozen model are, if its device does not hold all of them.

Embeddings, final norm and head are on the device of the model in each placement, and so is what the
model returns.  Gradients are supported for models that are whole only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.heads import split
from llmdistill.models.layers import decoder_layers, layers_replaced

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
    """Keep the decoder layers on the CPU, and copy them to the device while the model is used.

    It lasts as long as a context `at_hand` is open: for all the tokens of a batch that is written,
    or for one pass that scores.  The device needs memory for all layers, but only then.  The CPU
    needs up to twice the memory of the weights, because pinned memory comes in powers of two.
    """
    _move_the_rest(model, device)
    layers = decoder_layers(model)
    if device.type == "cuda":  # copies from pinned memory are several times faster
        for tensor in _tensors(layers):
            tensor.data = tensor.data.pin_memory()
    vars(model)["placed"] = _Parked(layers, device)
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
        own = device.index or 0
        others = [torch.device(device.type, place) for place in found if place != own]
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
    # With the backbone as the root, FSDP2 gathers the next layer while one computes.  The weights
    # outside the layers stay whole.
    inside = {id(parameter) for parameter in layers.parameters()}
    rest = {one for one in model.parameters() if id(one) not in inside}
    backbone = split(model)[0]
    fully_shard(backbone, mesh=mesh, ignored_params=rest)
    vars(model)["placed"] = _Sharded(backbone)
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
    is_spread = any(hasattr(layer, "_hf_hook") for layer in model.modules())
    return len(devices) == 1 and not is_spread and "placed" not in vars(model)


@contextlib.contextmanager
def at_hand(model: nn.Module) -> Iterator[None]:
    """Make a model ready for its forward passes, and give back afterwards what they took.

    Contexts can be nested.  The outermost one moves parked layers.
    """
    placed = vars(model).get("placed")
    with contextlib.nullcontext() if placed is None else placed.at_hand():
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


class _Sharded:
    """A backbone whose layers FSDP2 gathers."""

    def __init__(self, backbone: Any) -> None:
        self.backbone, self.in_use = backbone, False

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        outermost, self.in_use = not self.in_use, True
        try:
            yield
        finally:
            if outermost:
                self.in_use = False
                # FSDP2 keeps a list of all passes until a backward pass, which never comes here.
                self.backbone.reset_iter_state()


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _move_the_rest(model: PreTrainedModel, device: torch.device) -> None:
    """Move all but the decoder layers to the device."""
    with layers_replaced(model, nn.ModuleList()):
        model.to(device)
