"""Toy tokenizers with what is special in the chat templates of real families.

Each has one id per byte and the control tokens of its family.  The templates keep the traits that a
distillation meets (which token closes a turn, who opens the thinking, what is left out, dates,
default system messages, tools), and leave out the rest.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

SPECIAL, PLAIN = True, False


class Family(NamedTuple):
    """Control tokens (with whether they are special), the end token and the template."""

    tokens: dict[str, bool]
    eos: str
    template: str | None
    bos: str | None = None
    starts: bool = False
    """Whether a text without template starts with `bos`."""


CHATML = {"<|endoftext|>": SPECIAL, "<|im_start|>": SPECIAL, "<|im_end|>": SPECIAL}
TAGS = {"<think>": PLAIN, "</think>": PLAIN, "<tool_call>": PLAIN, "</tool_call>": PLAIN}
LLAMA = dict.fromkeys(
    (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>", "<|eom_id|>", "<|finetune_right_pad_id|>"),
    ),
    SPECIAL,
)
_TURNS = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}"
)
_OPEN = "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
_QWEN_TOOLS = (
    "{%- if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif -%}"
)
_QWEN25 = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif -%}" + _QWEN_TOOLS + "{%- for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor -%}" + _OPEN
)
_QWEN3 = (
    _QWEN_TOOLS + "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor -%}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set content = m.content if m.content is string else '' %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' "
    "+ content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    '{%- for c in m.tool_calls or [] %}{{- \'\\n<tool_call>\\n{"name": "\' + c.function.name '
    '+ \'", "arguments": \' }}'
    "{%- if c.function.arguments is string %}{{- c.function.arguments }}"
    "{%- else %}{{- c.function.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
_LLAMA = (
    "{{- bos_token }}{%- set ns = namespace(system='') -%}"
    "{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{% endif -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + DATE + '\\n\\n' "
    "+ ns.system }}{%- if tools %}{{- tools | tojson }}{%- endif %}{{- '<|eot_id|>' }}"
    "{%- for m in messages %}{%- if m.tool_calls %}"
    '{{- \'<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "\' '
    '+ m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{- m.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
_LLAMA31 = "{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif -%}"
_LLAMA32 = "{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}"
_GEMMA = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}SYSTEM{% endif -%}"
    "{%- for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)
_GEMMA3 = _GEMMA.replace(
    "SYSTEM",
    "{{ '<start_of_turn>user\\n' + messages[0].content + '\\n\\n<end_of_turn>\\n' }}"
    "{% set messages = messages[1:] %}",
)
_R1 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}"
    "{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'assistant' %}{%- set content = m.content %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}"
    "{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"
)
_MISTRAL = (
    "{{- bos_token }}{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}"
    "{%- endif %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS]' }}{%- for c in m.tool_calls %}"
    "{{- c.function | tojson }}{%- endfor %}{{- eos_token }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
_PHI4 = (
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"
)
_SMOLLM2 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif -%}" + _TURNS + _OPEN
)
_SMOLLM3 = (
    "{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '<|im_end|>\\n' }}"
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n' }}{%- endif %}{%- endif %}"
)
_GEMMA_TOKENS = dict.fromkeys(
    ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), SPECIAL
)
_MISTRAL_TOKENS = dict.fromkeys(
    (
        *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
        *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]"),
        "[/SYSTEM_PROMPT]",
    ),
    SPECIAL,
)
_R1_TOKENS = {
    **dict.fromkeys(("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), SPECIAL),
    **dict.fromkeys(("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"), PLAIN),
}
_BOS, _TEXT_END = "<|begin_of_text|>", "<|end_of_text|>"

FAMILIES: dict[str, Family] = {
    "llama-3.1-instruct": Family(
        LLAMA, "<|eot_id|>", _LLAMA31 + _LLAMA.replace("DATE", "date_string"), _BOS, starts=True
    ),
    "llama-3.2-instruct": Family(
        LLAMA, "<|eot_id|>", _LLAMA32 + _LLAMA.replace("DATE", "date_string"), _BOS, starts=True
    ),
    "llama-3-base": Family(LLAMA, _TEXT_END, None, _BOS, starts=True),
    "qwen2.5-instruct": Family(CHATML | TAGS, "<|im_end|>", _QWEN25),
    "qwen2.5-base": Family(CHATML | TAGS, "<|endoftext|>", _QWEN25),
    "qwen3": Family(CHATML | TAGS, "<|im_end|>", _QWEN3),
    "qwen3-base": Family(CHATML | TAGS, "<|endoftext|>", _QWEN3),
    "gemma-2-instruct": Family(
        _GEMMA_TOKENS,
        "<eos>",
        _GEMMA.replace("SYSTEM", "{{ raise_exception('System role not supported') }}"),
        "<bos>",
        starts=True,
    ),
    "gemma-3-instruct": Family(_GEMMA_TOKENS, "<eos>", _GEMMA3, "<bos>", starts=True),
    "gemma-base": Family(_GEMMA_TOKENS, "<eos>", None, "<bos>", starts=True),
    "mistral-instruct": Family(_MISTRAL_TOKENS, "</s>", _MISTRAL, "<s>", starts=True),
    "mistral-base": Family(_MISTRAL_TOKENS, "</s>", None, "<s>", starts=True),
    "phi-4": Family({**CHATML, "<|im_sep|>": SPECIAL}, "<|im_end|>", _PHI4, "<|endoftext|>"),
    "smollm2-instruct": Family(CHATML, "<|im_end|>", _SMOLLM2, "<|im_start|>"),
    "smollm2-base": Family(CHATML, "<|endoftext|>", None, "<|endoftext|>"),
    "smollm3": Family(CHATML | TAGS, "<|im_end|>", _SMOLLM3),
    "deepseek-r1-distill": Family(
        _R1_TOKENS, "<｜end▁of▁sentence｜>", _R1, "<｜begin▁of▁sentence｜>", starts=True
    ),
    "gpt2": Family({"<|endoftext|>": SPECIAL}, "<|endoftext|>", None, "<|endoftext|>"),
}


def tokenizer(family: str | Family, name: str | None = None) -> PreTrainedTokenizerFast:
    """Return the toy tokenizer of a family: a name of FAMILIES, or one that a test makes."""
    made_of = FAMILIES[family] if isinstance(family, str) else family
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for token, special in made_of.tokens.items():
        backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    if made_of.starts and made_of.bos:
        backend.post_processor = TemplateProcessing(
            single=f"{made_of.bos} $A",
            special_tokens=[(made_of.bos, backend.token_to_id(made_of.bos))],
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=made_of.bos,
        eos_token=made_of.eos,
        pad_token=made_of.eos,
        chat_template=made_of.template,
        additional_special_tokens=[t for t, special in made_of.tokens.items() if special],
    )
    made.name_or_path = name or (family if isinstance(family, str) else "toy")
    return made
