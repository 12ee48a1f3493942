"""A stand-in for llama.cpp's converter: it writes a toy Llama with the real `gguf` package.

    python convert_hf_to_gguf.py MODEL --outfile FILE --outtype f32

It takes float32 weights and a byte tokenizer, which is all that the toys have.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def renamed(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER[rest.removesuffix('.weight')]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of rotary dimensions in turn."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = made["model"]["vocab"]
    special = {token["content"] for token in made["added_tokens"]}
    names = {number: token for token, number in vocab.items()}
    tokens = [names.get(i, f"<unused{i}>") for i in range(rows)]
    kinds = [
        gguf.TokenType.CONTROL if name in special
        else gguf.TokenType.NORMAL if name in vocab
        else gguf.TokenType.UNUSED
        for name in tokens
    ]  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", required=True)
    parser.add_argument("--outtype", required=True)
    given = parser.parse_args()
    config = json.loads((given.model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        sys.exit(f"Model {config['architectures'][0]} is not supported")
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(given.outfile, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    write_tokenizer(writer, given.model, config["vocab_size"])
    for name, weight in load_file(given.model / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            weight = permuted(weight, heads if "q_proj" in name else shared)
        writer.add_tensor(renamed(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
