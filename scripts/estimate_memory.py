"""Estimate the memory of the recipes that need a GPU, without downloading their models.

    python scripts/estimate_memory.py

`llmdistill check` gives the same estimate from a model's configuration on the Hub and from the rows
of the dataset. This script needs no network: it types in the sizes that the models publish, and
assumes the longest rows that a recipe allows. Prints one line per recipe, in GiB for each GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from llmdistill import recipe as recipes
from llmdistill.cost import memory
from llmdistill.data.collate import PromptDataset
from llmdistill.data.table import Row

RECIPES = Path(__file__).parents[1] / "recipes"


def llama(hidden: int, mlp: int, layers: int, heads: int, keys: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=49152, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=True,
    )  # fmt: skip


def qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool = True) -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip


CONFIGS = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": llama(2048, 8192, 24, 32, 32),
    "HuggingFaceTB/SmolLM2-360M-Instruct": llama(960, 2560, 32, 15, 5),
    "Qwen/Qwen3-14B": qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32),
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16),
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 28, 16),
}


def estimate(path: Path) -> dict[str, float] | None:
    """Bytes by part for a training recipe; None if its models are not in CONFIGS."""
    given = recipes.parse_yaml(path.read_text(encoding="utf-8"), path.name)
    names = [given.get(part, {}).get("model") for part in ("teacher", "student")]
    if not all(name in CONFIGS for name in names):
        return None
    with tempfile.TemporaryDirectory() as folder:
        changes = []
        for part, name in zip(("teacher", "student"), names, strict=True):
            CONFIGS[name].save_pretrained(f"{folder}/{part}")
            changes.append(f"{part}.model={folder}/{part}")
        # A GPU multiplies bfloat16; this machine may not.
        changes.append("training.bf16=true")
        if given["teacher"].get("dtype", "auto") == "auto":
            changes.append("teacher.dtype=bfloat16")
        recipe = recipes.load(path, changes)
        data = recipe.data
        row = Row(0, [0] * data.max_prompt_tokens, [0] * data.max_response_tokens)
        return memory(recipe, PromptDataset([row]))


def main() -> None:
    for path in sorted(RECIPES.glob("*.yaml")):
        if parts := estimate(path):
            shown = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items() if size)
            print(f"{path.stem:18} {sum(parts.values()) / 2**30:5.1f} GiB: {shown}")


if __name__ == "__main__":
    main()
