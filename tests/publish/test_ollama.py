"""A Modelfile writes what the chat template writes, or it is refused."""

from __future__ import annotations

import re

import pytest

from llmdistill.errors import ModelError
from llmdistill.publish.ollama import modelfile
from tests import toy
from tests.support.families import tokenizer

TURN = re.compile(
    r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)(?=\{\{)', re.DOTALL
)
TALK = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello, you."},
    {"role": "user", "content": "Why?"},
]
SYSTEM = {"role": "system", "content": "Speak in rhymes."}


def as_ollama_writes(text: str, messages: list[dict]) -> str:
    """What Ollama makes of a Modelfile: the few parts of Go's templates that are used here."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, flags=re.DOTALL | re.MULTILINE)[1]
    body, _, opening = template.rpartition("{{ end }}{{ end }}")
    assert body.startswith("{{ range .Messages }}")
    turns = {role: parts for role, *parts in TURN.findall(body + "{{")}
    system = re.search(r'^SYSTEM """(.*?)"""$', text, flags=re.DOTALL | re.MULTILINE)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system[1]}, *messages]
    return "".join(one["content"].join(turns[one["role"]]) for one in messages) + opening


REGULAR = [
    "toy", "smollm2-instruct", "qwen2.5-instruct", "qwen3", "phi-4", "mistral-instruct",
    "deepseek-r1-distill",
]  # fmt: skip


@pytest.mark.parametrize("name", REGULAR)
@pytest.mark.parametrize(
    "messages", [TALK[:1], TALK, [SYSTEM, *TALK]], ids=["one", "more", "system"]
)
def test_ollama_writes_what_the_template_writes(name, messages):
    made = toy.tokenizer() if name == "toy" else tokenizer(name)
    expected = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    written = as_ollama_writes(modelfile("x.gguf", made, ["<|im_end|>"]), messages)
    # llama.cpp writes the start token itself, as the tokenizer does.
    starts = made("a")["input_ids"][0] == made.bos_token_id
    assert (made.bos_token if starts else "") + written == expected


def test_a_start_token_that_the_template_does_not_write_is_refused():
    """llama.cpp would write it before each conversation."""
    made = tokenizer("mistral-instruct")
    made.chat_template = made.chat_template.replace("{{- bos_token }}", "")
    with pytest.raises(ModelError, match="does not begin with the start token"):
        modelfile("x.gguf", made, [])


def test_a_default_system_message_is_ollamas_too():
    text = modelfile("x.gguf", tokenizer("qwen2.5-instruct"), ["<|im_end|>", "<|endoftext|>"])
    assert text.startswith("FROM ./x.gguf\n")
    assert 'SYSTEM """You are a helpful assistant."""' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n')


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma-2-instruct", "the chat template rejects this conversation"),
        ("llama-3.1-instruct", "is not a row of equal turns"),
        ("llama-3.2-instruct", "writes today's date"),
        ("smollm2-base", "has no chat template"),
    ],
)
def test_another_template_is_refused_with_what_to_do(name, reason):
    with pytest.raises(
        ModelError, match=f"(?s){reason}.*write the TEMPLATE of the Modelfile by hand"
    ):
        modelfile("x.gguf", tokenizer(name), [])


def test_a_template_with_marks_of_go_is_refused():
    made = toy.tokenizer()
    made.chat_template = toy.TEMPLATE.replace("<|im_end|>", "{{ '{{ x }}' }}<|im_end|>")
    with pytest.raises(ModelError, match="marks of Ollama's own language"):
        modelfile("x.gguf", made, [])
