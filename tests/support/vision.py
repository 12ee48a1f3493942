"""A tiny model that reads images and text, made from its configuration, and real PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import toy

SIZE, PATCH = 16, 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def processor() -> LlavaProcessor:
    tokenizer = toy.tokenizer("seer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def model(seed: int = 3) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIZE, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=toy.NUM_TOKENS + 13, hidden_size=48, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.15,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=toy.NUM_TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    made = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # otherwise the toy hardly looks at its images
        for parameter in made.model.multi_modal_projector.parameters():
            parameter.mul_(8)
    made.generation_config.eos_token_id = 2
    made.generation_config.pad_token_id = 0
    return made


def save(folder: Path) -> str:
    """Save the model and its processor; return the folder."""
    model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def pictures(folder: Path, number: int = 3) -> list[str]:
    """Write PNG files of different colours; return their paths."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place in range(number):
        colour = (80 * place % 256, 255 - 90 * place % 256, 40 + 60 * place % 200)
        path = folder / f"{place}.png"
        Image.new("RGB", (20 + place, 17), colour).save(path)
        paths.append(str(path))
    return paths


# A tiny Gemma 3 of the size that also reads images.
GEMMA_TEXT = {
    "vocab_size": toy.NUM_TOKENS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8,
    "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}  # fmt: skip
GEMMA_IMAGES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
