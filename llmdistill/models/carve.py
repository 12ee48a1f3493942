"""A student cut out of a teacher: fewer layers, everything else as it was.

B = sequences, T = tokens, H = hidden size.  A block's influence is 1 - cos(its input, its output),
averaged over the tokens of a sample text: a block that hardly turns the residual stream is hardly
missed (Men et al. 2024, "ShortGPT", eq. 1).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.heads import split

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def keep_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model with these layers of the teacher, in this order; shares no tensor with it."""
    backbone, _ = split(teacher)
    blocks = _blocks(teacher)
    if not layers or not all(0 <= layer < len(blocks) for layer in layers):
        raise ModelError(f"cannot keep layers {list(layers)} of a model that has {len(blocks)}")
    if len(set(layers)) < len(layers):
        raise ModelError(f"cannot keep a layer twice, got {list(layers)}")
    kept = nn.ModuleList(blocks[layer] for layer in layers)
    name = _blocks_name(backbone)
    setattr(backbone, name, kept)
    try:
        student = copy.deepcopy(teacher)
    finally:
        setattr(backbone, name, blocks)
    _renumber(student, layers)
    return student


def evenly_spaced(num_layers: int, num_kept: int) -> list[int]:
    """`num_kept` of `num_layers`, first and last among them."""
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def most_influential(influence: Tensor, num_kept: int) -> list[int]:
    """The layers with the largest influence, in the model's order."""
    return sorted(influence.topk(num_kept).indices.tolist())


@torch.no_grad()
def influence(teacher: PreTrainedModel, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Each layer's influence on this sample text: (layers,), in [0, 2]."""
    backbone, _ = split(teacher)
    real_BT = attention_mask_BT.bool()
    found: list[Tensor] = []

    def record(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        before_BTH = args[0] if args else kwargs["hidden_states"]
        after_BTH = output[0] if isinstance(output, tuple) else output
        cosine_BT = torch.cosine_similarity(before_BTH.float(), after_BTH.float(), dim=-1)
        found.append(1 - cosine_BT[real_BT].mean())

    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in _blocks(teacher)]
    try:
        backbone(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def num_layers(model: PreTrainedModel) -> int:
    return len(_blocks(model))


def check_num_layers(model: PreTrainedModel, num_kept: int) -> None:
    if not 0 < num_kept <= num_layers(model):
        raise ModelError(
            f"student.carve.layers: got {num_kept}, the model has {num_layers(model)} layers"
        )


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    backbone, _ = split(model)
    return getattr(backbone, _blocks_name(backbone))


def _blocks_name(backbone: nn.Module) -> str:
    """The one list of blocks of a backbone: `layers` in most families, `h` in GPT-2's."""
    names = [name for name, child in backbone.named_children() if isinstance(child, nn.ModuleList)]
    if len(names) != 1:
        raise ModelError(
            f"{type(backbone).__name__} has {len(names)} lists of blocks; only models with one "
            f"can be carved"
        )
    return names[0]


def _renumber(student: PreTrainedModel, layers: Sequence[int]) -> None:
    """Config and blocks count anew: caches find a layer by its number, configs list types per
    layer.
    """
    config = student.config.get_text_config()
    if isinstance(types := getattr(config, "layer_types", None), list):
        config.layer_types = [types[layer] for layer in layers]
    config.num_hidden_layers = len(layers)
    for index, block in enumerate(_blocks(student)):
        for module in block.modules():
            if "layer_idx" in module.__dict__:
                module.__dict__["layer_idx"] = index
