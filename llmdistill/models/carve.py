"""Carve a student out of a teacher: fewer layers, narrower MLPs, fewer attention heads.

A = attention heads, I = MLP neurons, B = sequences, T = tokens, H = hidden size, L = layers.

The influence of a layer is 1 - cos(input, output), averaged over the tokens of a sample text.  A
layer that hardly turns the residual stream contributes little (Men et al. 2024, "ShortGPT", eq. 1).
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

LAYER_NUMBERS = ("layer_idx", "layer_id")  # the second in GPT-Neo and RWKV
KEPT_LAYERS, DEPTH = "carved_layers", "carved_from_depth"
"""Fields of a carved model's configuration: the layers that it was cut from, counted from 1, and
the number of layers of that model."""


@dataclass(frozen=True)
class Plan:
    """The parts of a model that are kept.

    - `layers`: a number of layers, or the indices of layers; None keeps all of them.
    - `by`: how a number of layers is chosen: "influence", or "even" for evenly spaced.
    - `mlp_width` and `heads`: number of neurons and attention heads in each layer.  The most active
      ones are kept; None keeps all of them.
    """

    layers: int | Sequence[int] | None = None
    by: str = "influence"
    mlp_width: int | None = None
    heads: int | None = None


def carve(
    model: PreTrainedModel, plan: Plan, sample_BT: Tensor, attention_mask_BT: Tensor
) -> PreTrainedModel:
    """Return a new model with the parts that the plan keeps; it shares no tensor with `model`.

    Influence and activity are measured on the sample text.  Layers are removed first, and widths
    are then measured on the remaining ones.  Raises ModelError if that is not possible.
    """
    # Checks come first, because the measurements below run the model on the whole sample.
    if getattr(model, "is_quantized", False):
        raise ModelError(
            "the model is quantised, and packed weights cannot be cut. Carve the model without "
            "quantization, and quantise the result."
        )
    if plan.mlp_width is not None:
        widths.check_mlp_width(model, plan.mlp_width)
    if plan.heads is not None:
        widths.check_heads(model, plan.heads)
    layers = _layers(model, plan, sample_BT, attention_mask_BT)
    logger.info("carving: keeping layers %s", ", ".join(map(str, layers)))
    _check_attention(model, layers)
    student = keep_layers(model, layers)
    if plan.mlp_width is not None:
        activity_LI = widths.neuron_activity(student, sample_BT, attention_mask_BT)
        widths.keep_neurons(student, activity_LI, plan.mlp_width)
    if plan.heads is not None:
        activity_LA = widths.head_activity(student, sample_BT, attention_mask_BT)
        widths.keep_heads(student, activity_LA, plan.heads)
    _check_whole(student)
    return student


@torch.no_grad()
def _check_whole(student: PreTrainedModel) -> None:
    """Raise ModelError unless the carved model is the same once it is saved and loaded.

    Some families derive sizes from others: StableLM computes the size of a head from the number of
    heads.  Others compute with the number of a layer: DiffLlama, and GPT-2 with a scale by layer.
    So a model is made of the configuration, gets the weights, and must write the same logits.
    """
    with torch.device("meta"):  # shapes without memory
        rebuilt = type(student)(student.config)
    ours, theirs = student.state_dict(), rebuilt.state_dict()
    for name in {**ours, **theirs}:
        mine, made = (tuple(one[name].shape) if name in one else None for one in (ours, theirs))
        if mine != made:
            raise ModelError(
                f"{type(student).__name__} cannot be carved like this: {name} has shape {mine}, "
                f"but its configuration gives it shape {made} when it is loaded. Carve only whole "
                "layers of this model, and keep its first layer."
            )
    rebuilt.load_state_dict(ours, assign=True)
    # Tables that are in no file, such as the angles of positions, do not depend on the layer.
    for one, other in zip(student.modules(), rebuilt.modules(), strict=True):
        other._buffers.update(one._buffers)
    tokens_BT = torch.arange(1, 9, device=student.device)[None]
    found, expected = (_read_in_two_parts(one.eval(), tokens_BT) for one in (rebuilt, student))
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{type(student).__name__} computes with the number of each layer, so the carved model "
            f"would be another one once it is loaded (its logits differ by up to "
            f"{float((found - expected).abs().max()):.3g}). Carve another model, or keep the first "
            "layers: carve.layers: [0, 1, ...]."
        )


def _read_in_two_parts(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Return the logits of a text whose second half is read with the cache of the first."""
    half = tokens_BT.shape[1] // 2
    try:
        first = model(input_ids=tokens_BT[:, :half], use_cache=True)
        cache = getattr(first, "past_key_values", None)
        if cache is None:  # it keeps another state, or none
            return model(input_ids=tokens_BT, use_cache=False).logits.float()
        rest = model(input_ids=tokens_BT[:, half:], past_key_values=cache, use_cache=True)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be carved like this: the carved model does not run "
            f"({type(error).__name__}: {error}). Keep other layers, or carve another model."
        ) from error
    return torch.cat([first.logits, rest.logits], 1).float()


def _layers(
    model: PreTrainedModel, plan: Plan, sample_BT: Tensor, attention_mask_BT: Tensor
) -> list[int]:
    """Return the indices of the layers that a plan keeps."""
    count = len(decoder_layers(model))
    if plan.layers is None:
        return list(range(count))
    if not isinstance(plan.layers, int):
        if any(isinstance(layer, bool) for layer in plan.layers):
            raise ModelError(f"carve.layers: got {plan.layers}. List the indices of layers.")
        return list(plan.layers)
    check_num_layers(plan.layers, count)
    if plan.by == "even":
        return evenly_spaced(count, plan.layers)
    return most_influential(influence(model, sample_BT, attention_mask_BT), plan.layers)


def _check_attention(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Raise ModelError if a model with some attention layers would keep none of them.

    Caches of such hybrids are made for attention, and cannot hold a text without any.
    """
    attend = [
        place
        for place, block in enumerate(decoder_layers(model))
        if any(getattr(block, name, None) is not None for name in ("self_attn", "attention"))
    ]
    if 0 < len(attend) < len(decoder_layers(model)) and not set(layers) & set(attend):
        raise ModelError(
            f"keeping layers {list(layers)} leaves no attention layer, and this model could not "
            f"write without one. List the layers to keep, with one of {attend}: carve.layers."
        )


def check_num_layers(number: int, count: int) -> None:
    """Raise ModelError if a model of `count` decoder layers cannot keep this number of them."""
    if isinstance(number, bool) or not 0 < number <= count:
        raise ModelError(
            f"carve.layers: got {number}, but the model has {count} layers. Use a number from 1 to "
            f"{count}."
        )


def keep_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a copy of the teacher with only these layers, in this order.

    It shares no tensor with the teacher.  Raises ModelError for an index that does not exist or is
    repeated, and for an empty list.
    """
    own = decoder_layers(teacher)
    if not layers or not all(0 <= layer < len(own) for layer in layers):
        raise ModelError(
            f"cannot keep layers {list(layers)}: the model has {len(own)} layers. Use indices from "
            f"0 to {len(own) - 1}."
        )
    if len(set(layers)) < len(layers):
        raise ModelError(f"cannot keep a layer twice: got {list(layers)}. List each layer once.")
    # Only the kept layers are copied: a copy of the whole model would need more memory.
    with layers_replaced(teacher, nn.ModuleList(own[layer] for layer in layers)):
        student = copy.deepcopy(teacher)
    _renumber(student, layers)
    return student


def evenly_spaced(num_layers: int, num_kept: int) -> list[int]:
    """Return `num_kept` evenly spaced indices of `num_layers` layers.

    The first and the last layer are among them; a single index is 0.
    """
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def most_influential(influence_L: Tensor, num_kept: int) -> list[int]:
    """Return the indices of the `num_kept` layers with the largest influence, sorted."""
    return sorted(influence_L.topk(num_kept).indices.tolist())


@torch.no_grad()
def influence(teacher: PreTrainedModel, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Return the influence of each layer on the sample text: (L,), in [0, 2]."""

    def turn(args: tuple, kwargs: dict, output: Any) -> Tensor:
        # Families call their layers in different ways, and return a tensor or a tuple.
        before_BTH = args[0] if args else kwargs["hidden_states"]
        after_BTH = output[0] if isinstance(output, tuple) else output
        return 1 - torch.cosine_similarity(before_BTH.float(), after_BTH.float(), dim=-1)

    return mean_over_tokens(
        teacher, list(decoder_layers(teacher)), turn, input_ids_BT, attention_mask_BT
    )


def _renumber(student: PreTrainedModel, layers: Sequence[int]) -> None:
    """Renumber the layers of a carved model, and cut the lists in its configuration.

    Caches find a layer by its number, and configurations list a type for each layer.
    """
    config = student.config.get_text_config()
    setattr(config, DEPTH, config.num_hidden_layers)
    for name, value in list(vars(config).items()):
        per_layer = isinstance(value, list) and len(value) == config.num_hidden_layers
        # Such as layer_types and no_rope_layers.  A list of tokens may have the same length.
        if per_layer and "token" not in name:
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    setattr(config, KEPT_LAYERS, [layer + 1 for layer in layers])
    for index, block in enumerate(decoder_layers(student)):
        for module in block.modules():
            for name in LAYER_NUMBERS:
                if name in module.__dict__:
                    module.__dict__[name] = index
