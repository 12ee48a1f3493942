"""Estimate the memory of a run by part, from configurations alone: no weights are loaded.

A = attention heads, H = hidden size, I = MLP neurons, L = layers, V = vocabulary.

The estimate is for one device without sharding.  Tests compare the activations with those that
autograd saves, and the copies of the head with the measured peak of a step; they agree within a
quarter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from llmdistill.models import widths
from llmdistill.models.carve import Plan, check_num_layers, evenly_spaced, keep_layers
from llmdistill.models.chunks import CHUNK_NUMBERS, CHUNK_ROWS
from llmdistill.models.heads import split
from llmdistill.models.layers import decoder_layers
from llmdistill.models.quantization import QUANTIZATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Bytes for each trained parameter.
ADAM_BYTES = 8.0  # two moments in float32
OPTIMIZER_BYTES = {"sgd": 0.0, "adafactor": 0.0, "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0}
CHUNK_BUFFERS = 3  # float32 chunks: logits of student and teacher, and one computed from them


@dataclass(frozen=True)
class Load:
    """What a training step works on.

    - `tokens`: tokens of a micro-batch.
    - `written_tokens`: tokens of the window of micro-batches whose responses are written at once.
    - `product_bytes`: bytes of a number in activations and caches.
    - `checkpointing`: whether activations are computed again in the backward pass.
    - `optimizer`: its name in `transformers.TrainingArguments`.
    - `accumulates`: whether gradients of several micro-batches are added up.
    """

    tokens: int
    written_tokens: int
    product_bytes: float
    checkpointing: bool = False
    optimizer: str = "adamw"
    accumulates: bool = False


def num_bytes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a model's weights, including those of quantised weights.

    With `dtype`, they are those of its files in that dtype.
    """
    if dtype is not None:
        return model.num_parameters() * dtype.itemsize
    total = 0
    for parameter in model.parameters():
        inner = [parameter]
        # Those of torchao are tensors made of tensors.  Sharded ones count with all their shards.
        if hasattr(parameter, "__tensor_flatten__") and not isinstance(parameter, DTensor):
            inner = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        total += sum(tensor.numel() * tensor.element_size() for tensor in inner)
    return total


def skeleton(
    config: PreTrainedConfig, plan: Plan | None = None, *, sees_images: bool = False
) -> PreTrainedModel:
    """Return a model of this configuration without weights, carved if there is a plan."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    config = config if sees_images else config.get_text_config()
    with torch.device("meta"):
        model = loader.from_config(config)
    if plan is None:
        return model
    count = len(decoder_layers(model))
    # Which layers, neurons and heads are kept does not change the size, so nothing is measured.
    kept = count if plan.layers is None else plan.layers
    if isinstance(kept, int):
        check_num_layers(kept, count)
        kept = evenly_spaced(count, kept)
    model = keep_layers(model, kept)
    text = model.config.get_text_config()
    if plan.mlp_width is not None:
        widths.check_mlp_width(model, plan.mlp_width)
        activity_LI = torch.zeros(len(decoder_layers(model)), text.intermediate_size)
        widths.keep_neurons(model, activity_LI, plan.mlp_width)
    if plan.heads is not None:
        widths.check_heads(model, plan.heads)
        activity_LA = torch.zeros(len(decoder_layers(model)), text.num_attention_heads)
        widths.keep_heads(model, activity_LA, plan.heads)
    return model


def weight_bytes(
    model: PreTrainedModel,
    size: float,
    quantization: str | None = None,
    resident_layers: int | None = None,
) -> float:
    """Return the bytes of a model's weights on the device, at `size` bytes each.

    With `quantization`, a key of QUANTIZATIONS, the decoder layers take less.  With
    `resident_layers`, only that many of them are on the device at a time.
    """
    if quantization is None and resident_layers is None:
        return size * sum(p.numel() for p in model.parameters())
    in_layers = sum(p.numel() for p in decoder_layers(model).parameters())
    others = sum(p.numel() for p in model.parameters()) - in_layers
    if resident_layers is not None:
        in_layers = in_layers * resident_layers // len(decoder_layers(model))
    in_layer = size if quantization is None else QUANTIZATIONS[quantization].bytes_per_weight
    return others * size + in_layers * in_layer


def footprint(student: PreTrainedModel, load: Load) -> dict[str, float]:
    """Return the bytes by part that training needs in addition to the weights of both models."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    optimizer = optimizer_bytes(load.optimizer)
    return {
        "gradients": 4.0 * trained,
        "optimizer": optimizer * trained,
        "activations": activation_bytes(student, load),
        "outputs of the adapter": adapter_bytes(student, load),
        "cache while writing": load.written_tokens * load.product_bytes * cached_numbers(student),
        "chunks of logits": chunk_bytes(student, load),
        "copies of the head": head_bytes(student, load),
    }


def chunk_bytes(student: PreTrainedModel, load: Load) -> float:
    """Return the bytes of the logits of one chunk, and of what is computed from them."""
    vocab_size = student.config.get_text_config().vocab_size
    return 4.0 * CHUNK_BUFFERS * min(min(CHUNK_ROWS, load.tokens) * vocab_size, CHUNK_NUMBERS)


def head_bytes(student: PreTrainedModel, load: Load, num_losses: int = 1) -> float:
    """Return the bytes of what is as large as the head, besides its weight and its gradient.

    A loss over the vocabulary copies the weight into the dtype of products, and makes the gradient
    of its micro-batch.  That gradient becomes the weight's own, unless the weight has one already:
    from a micro-batch before, or from another one of the `num_losses`.  If the head is tied to the
    embeddings, their gradient is as large once more, but copy and chunks are gone by then.
    """
    weight_VH = split(student)[1].weight_VH
    copy = load.product_bytes * weight_VH.numel() if load.product_bytes < 4 else 0.0
    if not weight_VH.requires_grad:
        return copy
    gradient = 4.0 * weight_VH.numel()
    is_tied = student.get_input_embeddings().weight is weight_VH
    freed = copy + chunk_bytes(student, load)
    of_embeddings = max(gradient - freed, 0.0) if is_tied else 0.0
    return gradient * (load.accumulates + num_losses - 1) + copy + of_embeddings


def adapter_bytes(student: PreTrainedModel, load: Load) -> float:
    """Return the bytes of the outputs of all layers with an adapter.

    Each such layer makes its output three times: of the base layer, of the adapter and of both.
    Autograd keeps none of them, but they are made between tensors that it keeps, so that their
    memory is not free in one piece.  On a CPU, runs with an adapter took this much more than
    weights, activations and chunks together.
    """
    outputs = (
        module.base_layer.weight.shape[0]
        for module in student.modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    )
    return load.tokens * load.product_bytes * sum(outputs)


def optimizer_bytes(optimizer: str) -> float:
    """Return the bytes that an optimizer keeps for each trained parameter."""
    return OPTIMIZER_BYTES.get(optimizer, ADAM_BYTES)


def activation_bytes(student: PreTrainedModel, load: Load) -> float:
    """Return the bytes that the backward pass needs from the forward pass, without the head.

    Each decoder layer saves two residual states, two normalised ones, queries, keys and values
    before and after the rotary embedding, the output of the attention, and four states of its MLP.
    With checkpointing, it saves one residual state, and only one layer at a time saves everything.
    The final norm saves two states.
    """
    config = student.config.get_text_config()
    keys = cached_numbers(student) / config.num_hidden_layers
    # Two residual and two normalised states, queries twice, and the attention's output: 7 of H.
    block = 7 * config.hidden_size + 2 * keys + 4 * getattr(config, "intermediate_size", 0)
    if load.checkpointing:
        kept = config.num_hidden_layers * config.hidden_size + block
    else:
        kept = config.num_hidden_layers * block
    return load.tokens * load.product_bytes * (kept + 2 * config.hidden_size)


def cached_numbers(model: PreTrainedModel) -> float:
    """Return how many numbers a cache stores for one token: keys and values of all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size
