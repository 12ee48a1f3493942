"""`last_messages`: what a user said last, without the template's control tokens."""

from __future__ import annotations

import pytest

from llmdistill.data.formats import Example
from llmdistill.data.render import last_messages, render
from tests import toy

# As Mistral's: nothing but the end token is in front of a later turn, and the first has another start.
BRACKETS = (
    "<|im_start|>{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + toy.TEMPLATE
)
THINKS = toy.TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n{% endif")


def user(*contents: str) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant") * len(contents)
    return tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))


@pytest.mark.parametrize("template", [toy.TEMPLATE, BRACKETS, SYSTEM_FIRST, THINKS])
def test_the_last_message_is_found(template):
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = template
    conversations = [
        user("Name a fruit."),
        user("One\n\ntwo: three"),
        user("First", "An answer", "Second\nline"),
        user("user"),
    ]
    prompts = [render(tokenizer, Example(one, None, "x"))[0] for one in conversations]
    expected = ["Name a fruit.", "One\n\ntwo: three", "Second\nline", "user"]
    assert last_messages(tokenizer, prompts) == expected


def test_a_template_of_one_turn_does_not_stop_a_run():
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + toy.TEMPLATE
    )
    prompts = [render(tokenizer, Example(user("Once upon"), None, "x"))[0]]
    (found,) = last_messages(tokenizer, prompts)
    assert "Once upon" in found
    assert "<|im_start|>" not in found


def test_without_a_template_it_is_the_whole_prompt():
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = None
    prompts = [render(tokenizer, Example(user("Once upon"), None, "x"))[0]]
    assert last_messages(tokenizer, prompts) == ["Once upon"]


def test_a_prompt_that_the_template_did_not_make_is_shown_without_special_tokens():
    tokenizer = toy.tokenizer()
    ids = tokenizer("plain words<|im_end|>", add_special_tokens=False)["input_ids"]
    assert last_messages(tokenizer, [ids]) == ["plain words"]
