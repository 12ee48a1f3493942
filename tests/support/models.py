"""Small models of many families, with random weights."""

from __future__ import annotations

import torch
import transformers

from tests import toy

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GPT2_SIZES = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
}
# Each with the extra operation of its head (if it has one), set so that it changes the logits.
FAMILIES = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES | {"head_dim": 8},
    "Mistral": SIZES,
    "Mixtral": SIZES | {"num_local_experts": 4},
    "Phi3": SIZES,
    "Olmo2": SIZES,
    "GPTNeoX": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "Gemma3": SIZES | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Gemma2": SIZES | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "GPT2": GPT2_SIZES,
    "Cohere": SIZES | {"logit_scale": 0.25},
    "Granite": SIZES | {"logits_scaling": 4.0},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def family(name: str, **options) -> transformers.PreTrainedModel:
    """Return a model in eval mode. `options` go to its configuration and replace the sizes above."""
    torch.manual_seed(0)
    sizes = FAMILIES.get(name, SIZES) | options
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**sizes)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, name + suffix)(config).eval()


def sliding(name: str, window: int = 4, **options) -> transformers.PreTrainedModel:
    """Return a float64 model with sliding windows: all layers of Mistral, the first of Gemma2."""
    sizes = {
        "vocab_size": toy.NUM_TOKENS,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": window,
        "initializer_range": 0.2,
    }
    if name != "Mistral":
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    return family(name, **sizes | options).double()
