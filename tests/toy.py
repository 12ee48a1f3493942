"""Toys for tests: a byte tokenizer with a chat template, and tiny models that share it.

Teacher and student differ in width, in depth and in the padding rows of their heads, and prompts
and responses are ragged.  A test that mixes them up therefore cannot pass by chance.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmdistill.batch import Sequences
from llmdistill.sampling import Writer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
NUM_TOKENS = 256 + len(SPECIAL)

WORDS = [
    "name",
    "list",
    "three",
    "red",
    "birds",
    "explain",
    "why",
    "the",
    "sea",
    "is",
    "blue",
    "add",
    "two",
    "and",
    "five",
    "write",
    "a",
    "short",
    "poem",
]


def tokenizer(name: str = "toy") -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id per byte and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )
    made.name_or_path = name
    return made


def model(
    *, seed: int = 0, hidden: int = 32, layers: int = 3, rows: int = NUM_TOKENS + 5, **options
) -> LlamaForCausalLM:
    """Return a Llama with random weights, spread so widely that its distributions are not flat."""
    torch.manual_seed(seed)
    options = {
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | options
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.15,
        **options,
    )
    made = LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id = 2
    made.generation_config.pad_token_id = 0
    return made


def teacher_model(**options) -> LlamaForCausalLM:
    return model(**({"seed": 1, "hidden": 48, "layers": 4, "rows": NUM_TOKENS + 13} | options))


def rows(number: int = 12, *, seed: int = 0, answers: bool = True) -> list[dict]:
    """Return Alpaca rows of very different lengths."""
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        row = {"instruction": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))), "input": ""}
        if answers:
            row["output"] = " ".join(draw.choices(WORDS, k=draw.randint(1, 7)))
        made.append(row)
    return made


def sequences(
    number: int = 5, *, seed: int = 0, writer: Writer = Writer.DATA, longest: int = 9
) -> Sequences:
    """Return random ids in which prompt and response lengths differ from row to row."""
    draw = random.Random(seed)
    prompts = [
        [draw.randint(3, NUM_TOKENS - 1) for _ in range(draw.randint(1, 6))] for _ in range(number)
    ]
    responses = [
        [draw.randint(3, NUM_TOKENS - 1) for _ in range(draw.randint(1, longest))]
        for _ in range(number)
    ]
    return Sequences.pack(prompts, responses, list(range(number)), writer=writer, pad_id=0)


def save_pair(folder: Path) -> tuple[str, str]:
    """Save teacher and student as model folders; return their paths."""
    paths = []
    for name, made in (("teacher", teacher_model()), ("student", model())):
        made.save_pretrained(folder / name)
        tokenizer(name).save_pretrained(folder / name)
        paths.append(str(folder / name))
    return paths[0], paths[1]
