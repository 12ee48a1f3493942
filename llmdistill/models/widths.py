"""Narrow the decoder layers of a model to the MLP neurons and attention heads that are most active.

B = sequences, T = tokens, N = real tokens, L = layers, I = MLP neurons, A = attention heads, D =
size of a head.

Activity is measured on a sample text.  For a neuron, it is the root mean square of its input to
the down projection.  For a head, it is the mean norm of its input to the output projection
(Muralidharan et al. 2024, "Minitron", section 2.2).  Heads that share keys and values are kept or
dropped together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.activations import mean_over_tokens
from llmdistill.models.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS = ("q_norm", "k_norm")  # norms of the queries and keys of each head, in some families


def check_mlp_width(model: PreTrainedModel, width: int) -> None:
    """Raise ModelError unless the MLPs of the model can be narrowed to this number of neurons."""
    neurons = _parts(model, "mlp", ("up_proj", "down_proj"))[0].up_proj.out_features
    if not 0 < width <= neurons:
        raise ModelError(
            f"carve.mlp_width: got {width}, but an MLP of this model has {neurons} neurons. Use a "
            f"number from 1 to {neurons}."
        )


def check_heads(model: PreTrainedModel, heads: int) -> None:
    """Raise ModelError unless the model can be narrowed to this number of attention heads."""
    known = ("q_proj", "k_proj", "v_proj", "o_proj")
    num_heads, shared, size = _attention_shape(model)
    for attention in _parts(model, "self_attn", known):
        weights = {name.split(".")[0]: p for name, p in attention.named_parameters()}
        odd = [name for name in weights if name not in (*known, *NORMS)]
        # A norm of the size of one head is shared by all heads.  A larger one spans several heads,
        # so its result would change if some were dropped.
        odd += [name for name in NORMS if name in weights and weights[name].numel() != size]
        if odd or attention.q_proj.out_features != num_heads * size:
            raise ModelError(
                f"carve.heads: {type(attention).__name__} is not plain attention "
                f"({', '.join(odd) or 'q_proj'}), so llmdistill cannot drop some of its heads. "
                "Remove carve.heads."
            )
    if not 0 < heads <= num_heads or heads % shared:
        raise ModelError(
            f"carve.heads: got {heads}, but the model has {num_heads} heads, and each group of "
            f"{shared} shares its keys and values. Use a multiple of {shared} up to {num_heads}."
        )


def neuron_activity(model: PreTrainedModel, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Return the activity of each MLP neuron: (L, I)."""
    layers = [mlp.down_proj for mlp in _parts(model, "mlp", ("down_proj",))]

    def squares(args: tuple, _kwargs: dict, _output: Any) -> Tensor:
        return args[0].float().square()

    return mean_over_tokens(model, layers, squares, ids_BT, attention_mask_BT).sqrt()


def head_activity(model: PreTrainedModel, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Return the activity of each attention head: (L, A)."""
    num_heads, _, size = _attention_shape(model)
    layers = [attention.o_proj for attention in _parts(model, "self_attn", ("o_proj",))]

    def norms(args: tuple, _kwargs: dict, _output: Any) -> Tensor:
        return args[0].float().unflatten(-1, (num_heads, size)).norm(dim=-1)

    return mean_over_tokens(model, layers, norms, ids_BT, attention_mask_BT)


def keep_neurons(model: PreTrainedModel, activity_LI: Tensor, width: int) -> None:
    """Narrow each MLP of the model to its `width` most active neurons, in place."""
    for mlp, activity_I in zip(_parts(model, "mlp", ("down_proj",)), activity_LI, strict=True):
        kept = _largest(activity_I, width)
        # Neurons are the inputs of the down projection, and the outputs of all other layers.
        for name, layer in mlp.named_children():
            if isinstance(layer, nn.Linear):
                _narrow(layer, kept, inputs=name == "down_proj")
    model.config.get_text_config().intermediate_size = width


def keep_heads(model: PreTrainedModel, activity_LA: Tensor, heads: int) -> None:
    """Narrow each attention of the model to its `heads` most active heads, in place."""
    _, shared, size = _attention_shape(model)
    counts = {"num_attention_heads": heads, "num_key_value_heads": heads // shared}
    attributes = counts | {"num_heads": heads}  # some attentions store copies of these
    parts = _parts(model, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))
    for attention, activity_A in zip(parts, activity_LA, strict=True):
        # Groups of heads with the same keys and values are ranked by the sum of their activity.
        groups = _largest(activity_A.unflatten(0, (-1, shared)).sum(-1), heads // shared)
        queries = _spread(_spread(groups, shared), size)
        _narrow(attention.q_proj, queries)
        _narrow(attention.k_proj, _spread(groups, size))
        _narrow(attention.v_proj, _spread(groups, size))
        _narrow(attention.o_proj, queries, inputs=True)
        attention.__dict__.update(
            {name: count for name, count in attributes.items() if name in attention.__dict__}
        )
    config = model.config.get_text_config()
    config.head_dim = size  # otherwise derived from the number of heads
    for name, count in counts.items():
        setattr(config, name, count)


def _parts(model: PreTrainedModel, part: str, layers: tuple[str, ...]) -> list[Any]:
    """Return the module `part` of each decoder layer.

    Raises ModelError if one of them does not have these linear layers.
    """
    found = [getattr(block, part, None) for block in decoder_layers(model)]
    for module in found:
        if not all(isinstance(getattr(module, name, None), nn.Linear) for name in layers):
            raise ModelError(
                f"{type(model).__name__} does not have {part}.{{{', '.join(layers)}}} as plain "
                "linear layers in each decoder layer. Carve only whole layers: set carve.layers."
            )
    return found


def _attention_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Return the number of heads, of heads that share keys and values, and the size of a head."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    return heads, shared, getattr(config, "head_dim", None) or config.hidden_size // heads


def _largest(activity: Tensor, number: int) -> Tensor:
    """Return the indices of the largest entries, sorted, so that kept parts stay in order."""
    return activity.topk(number).indices.sort().values


def _spread(places: Tensor, size: int) -> Tensor:
    """Return the indices of all rows in blocks of `size` rows: [1] and 3 give [3, 4, 5]."""
    return (places[:, None] * size + torch.arange(size, device=places.device)).flatten()


def _narrow(layer: nn.Linear, kept: Tensor, *, inputs: bool = False) -> None:
    """Keep only these outputs of a linear layer, or these inputs."""
    # Outputs are the rows of a weight (dimension 0), inputs its columns (dimension 1).
    places = kept.to(layer.weight.device)
    weight = layer.weight.detach().index_select(int(inputs), places)
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None and not inputs:
        bias = layer.bias.detach()[places]
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    layer.out_features, layer.in_features = layer.weight.shape
