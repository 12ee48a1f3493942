"""How much memory a run will hold, by part: from configurations alone, nothing is loaded.

A = attention heads, H = hidden size, I = MLP neurons, L = layers, V = vocabulary.  An estimate of
what lies on one device without sharding; the test compares its activations with those that autograd
keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmdistill.models import widths
from llmdistill.models.carve import Plan, evenly_spaced, keep_layers
from llmdistill.models.chunks import CHUNK_NUMBERS, CHUNK_ROWS
from llmdistill.models.layers import decoder_layers
from llmdistill.models.quantization import QUANTIZATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ADAM_BYTES = 8.0  # two moments of four bytes
OPTIMIZER_BYTES = {"sgd": 0.0, "adafactor": 0.0, "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0}
CHUNK_BUFFERS = 3  # chunks of logits in float32: of both sides, and what is made of them


@dataclass(frozen=True)
class Load:
    """What a step works on: the tokens of a micro-batch, and of the window that is written at
    once.
    """

    tokens: int
    written_tokens: int
    product_bytes: float
    checkpointing: bool = False
    optimizer: str = "adamw"


def num_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's weights as they are held, quantised ones too."""
    total = 0
    for parameter in model.parameters():
        inner = [parameter]
        if hasattr(parameter, "__tensor_flatten__"):  # torchao's are tensors made of tensors
            inner = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        total += sum(tensor.numel() * tensor.element_size() for tensor in inner)
    return total


def skeleton(config: PreTrainedConfig, plan: Plan | None = None) -> PreTrainedModel:
    """A model of this shape without any weights, of the plan's size where one is given."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if plan is None:
        return model
    count = len(decoder_layers(model))
    kept = count if plan.layers is None else plan.layers
    model = keep_layers(model, evenly_spaced(count, kept) if isinstance(kept, int) else kept)
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
    """Bytes of a model's weights at `size` bytes each.

    Its decoder layers may be quantised, or only `resident_layers` of them on the device at a time.
    """
    in_layers = sum(p.numel() for p in decoder_layers(model).parameters())
    others = sum(p.numel() for p in model.parameters()) - in_layers
    if resident_layers is not None:
        in_layers = in_layers * resident_layers // len(decoder_layers(model))
    in_layer = size if quantization is None else QUANTIZATIONS[quantization].bytes_per_weight
    return others * size + in_layers * in_layer


def footprint(student: PreTrainedModel, load: Load) -> dict[str, float]:
    """Bytes by part that training a student adds to the weights of both models."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    optimizer = OPTIMIZER_BYTES.get(load.optimizer, ADAM_BYTES)
    vocab_size = student.config.get_text_config().vocab_size
    return {
        "gradients": 4.0 * trained,
        "optimizer": optimizer * trained,
        "activations": activation_bytes(student, load),
        "cache while writing": load.written_tokens * load.product_bytes * cached_numbers(student),
        "chunks of logits": 4.0 * CHUNK_BUFFERS * min(CHUNK_ROWS * vocab_size, CHUNK_NUMBERS),
    }


def activation_bytes(student: PreTrainedModel, load: Load) -> float:
    """What a backward pass needs of the forward pass, without the head.

    A block keeps two residual states, two normalised ones, queries, keys and values before and
    after their rotation, the attention's output, and four rows of its MLP; with checkpointing one
    residual state, and all of one block at a time.  The final norm keeps two states.
    """
    config = student.config.get_text_config()
    keys = cached_numbers(student) / config.num_hidden_layers
    block = 7 * config.hidden_size + 2 * keys + 4 * getattr(config, "intermediate_size", 0)
    if load.checkpointing:
        kept = config.num_hidden_layers * config.hidden_size + block
    else:
        kept = config.num_hidden_layers * block
    return load.tokens * load.product_bytes * (kept + 2 * config.hidden_size)


def cached_numbers(model: PreTrainedModel) -> float:
    """Numbers that a cache holds for one token: keys and values of all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size
