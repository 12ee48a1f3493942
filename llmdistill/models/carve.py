"""A student cut out of a teacher: fewer layers, narrower MLPs, fewer attention heads.

A = attention heads, I = MLP neurons, B = sequences, T = tokens, H = hidden size, L = layers.  A
block's influence is 1 - cos(its input, its output), averaged over the tokens of a sample text: a
block that hardly turns the residual stream is hardly missed (Men et al. 2024, "ShortGPT", eq. 1).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models import widths
from llmdistill.models.activations import mean_over_tokens
from llmdistill.models.layers import decoder_layers, layers_replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger("llmdistill")


@dataclass(frozen=True)
class Plan:
    """What is kept.

    `layers`: how many, chosen `by` influence or evenly spaced, or which ones; None is all of them.
    `mlp_width` and `heads`: so many in each layer, those that are most active.
    """

    layers: int | Sequence[int] | None = None
    by: str = "influence"
    mlp_width: int | None = None
    heads: int | None = None


def carve(
    model: PreTrainedModel, plan: Plan, sample_BT: Tensor, attention_mask_BT: Tensor
) -> PreTrainedModel:
    """A new model with what the plan keeps, measured on a sample text; shares no tensor with
    `model`.

    Layers go first, and widths are measured on what they leave.  Raises ModelError where the model
    cannot be cut so.
    """
    if plan.mlp_width is not None:
        widths.check_mlp_width(model, plan.mlp_width)
    if plan.heads is not None:
        widths.check_heads(model, plan.heads)
    layers = _layers(model, plan, sample_BT, attention_mask_BT)
    logger.info("carving: keeping layers %s", ", ".join(map(str, layers)))
    student = keep_layers(model, layers)
    if plan.mlp_width is not None:
        activity_LI = widths.neuron_activity(student, sample_BT, attention_mask_BT)
        widths.keep_neurons(student, activity_LI, plan.mlp_width)
    if plan.heads is not None:
        activity_LA = widths.head_activity(student, sample_BT, attention_mask_BT)
        widths.keep_heads(student, activity_LA, plan.heads)
    _check_whole(student)
    return student


def _check_whole(student: PreTrainedModel) -> None:
    """Raises ModelError where the cut model's configuration would give a model of other shapes."""
    with torch.device("meta"):
        rebuilt = type(student)(student.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    for name, tensor in student.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            raise ModelError(
                f"{type(student).__name__} cannot be carved like this: {name} has shape "
                f"{tuple(tensor.shape)}, but its configuration gives it shape {shapes.get(name)} "
                "when it is loaded. Carve only whole layers of this model."
            )


def _layers(
    model: PreTrainedModel, plan: Plan, sample_BT: Tensor, attention_mask_BT: Tensor
) -> list[int]:
    """The layers that a plan keeps."""
    count = len(decoder_layers(model))
    if plan.layers is None:
        return list(range(count))
    if not isinstance(plan.layers, int):
        return list(plan.layers)
    if not 0 < plan.layers <= count:
        raise ModelError(
            f"carve.layers: got {plan.layers}, but the model has {count} layers. Use a number from "
            f"1 to {count}."
        )
    if plan.by == "even":
        return evenly_spaced(count, plan.layers)
    return most_influential(influence(model, sample_BT, attention_mask_BT), plan.layers)


def keep_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model with these layers of the teacher, in this order; shares no tensor with it."""
    own = decoder_layers(teacher)
    if not layers or not all(0 <= layer < len(own) for layer in layers):
        raise ModelError(
            f"cannot keep layers {list(layers)}: the model has {len(own)} layers. Use indices from "
            f"0 to {len(own) - 1}."
        )
    if len(set(layers)) < len(layers):
        raise ModelError(f"cannot keep a layer twice: got {list(layers)}. List each layer once.")
    with layers_replaced(teacher, nn.ModuleList(own[layer] for layer in layers)):
        student = copy.deepcopy(teacher)
    _renumber(student, layers)
    return student


def evenly_spaced(num_layers: int, num_kept: int) -> list[int]:
    """`num_kept` of `num_layers`, first and last among them."""
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def most_influential(influence_L: Tensor, num_kept: int) -> list[int]:
    """The layers with the largest influence, in the model's order."""
    return sorted(influence_L.topk(num_kept).indices.tolist())


@torch.no_grad()
def influence(teacher: PreTrainedModel, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Each layer's influence on this sample text: (L,), in [0, 2]."""

    def turn(args: tuple, kwargs: dict, output: Any) -> Tensor:
        before_BTH = args[0] if args else kwargs["hidden_states"]
        after_BTH = output[0] if isinstance(output, tuple) else output
        return 1 - torch.cosine_similarity(before_BTH.float(), after_BTH.float(), dim=-1)

    return mean_over_tokens(
        teacher, list(decoder_layers(teacher)), turn, input_ids_BT, attention_mask_BT
    )


def _renumber(student: PreTrainedModel, layers: Sequence[int]) -> None:
    """Config and blocks count anew: caches find a layer by its number, configs list types per
    layer.
    """
    config = student.config.get_text_config()
    for name, value in list(vars(config).items()):
        per_layer = isinstance(value, list) and len(value) == config.num_hidden_layers
        if per_layer and not name.endswith("_token_id"):  # layer_types, no_rope_layers, ...
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    for index, block in enumerate(decoder_layers(student)):
        for module in block.modules():
            if "layer_idx" in module.__dict__:
                module.__dict__["layer_idx"] = index
