"""Write conversations with the chat template of a tokenizer, as text and as ids.

Control tokens in the text of a message are encoded as ordinary text, so that only the template can
open or close a turn.  The one exception is a block of thinking at the start of an assistant's
message: its tags are the template's own, whichever way a row states the thinking.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import (
    _get_control_token_patterns,
    _get_template_literal_text,
    mark_control_tokens,
)

from llmdistill.errors import DataError
from llmdistill.models.thinking import TAGS, THINKING, thinking_block

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = ({"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."})


class ChatTemplate:
    """The chat template of a tokenizer, with the options of a run.

    A rendered conversation is a text in which marks surround control tokens that a message
    contains.  `ids` encodes the marked ones as ordinary text.  `place` is where the conversation
    comes from, with which errors start.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any] | None = None,
        place: str = "probe",
    ) -> None:
        self.tokenizer, self.options, self.place = tokenizer, dict(options or {}), place

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        opens: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Return a conversation as text, with the assistant's turn open if `opens`.

        Raises DataError if the template rejects the conversation, or does not write its tools or
        tool calls.
        """
        try:
            try:
                found = self._rendered(messages, tools, opens)
            except Exception:
                # Some templates join content, or the arguments of a call, to other text.
                found = self._rendered([_with_texts(one) for one in messages], tools, opens)
        except Exception as error:  # a template can raise any exception, jinja2's or its own
            raise DataError(
                f"{self.place}: the chat template rejects this conversation: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._check_tools(found, messages, tools)
        return found

    def ids(self, text: str) -> list[int]:
        """Return the ids of a rendered conversation.  Raises DataError if it is no Unicode."""
        try:
            found = self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)
        # `tokenizers` raises TypeError for text that is not valid Unicode.
        except TypeError as error:
            raise DataError(
                f"{self.place}: the text cannot be tokenised, probably because it is not valid "
                f"Unicode: {error}"
            ) from error
        return list(found["input_ids"])

    def ids_after(self, text: str) -> list[int]:
        """Return the ids of a text that continues a rendered one, encoded on its own."""
        # After a newline, because some tokenizers write a space before the start of a text.
        newline, found = self.ids("\n"), self.ids(f"\n{text}")
        continues = found[: len(newline)] == newline
        return found[len(newline) :] if continues else self.ids(text)

    def marked(self, value: Any) -> Any:
        """Return a text, or texts within lists and dicts, with marks around control tokens."""
        return mark_control_tokens(value, self._control_tokens())

    @property
    def closing_tags(self) -> list[str]:
        """The tags that end thinking and stand in the template itself."""
        literal = _get_template_literal_text(self._template())
        return [closing for _, closing in TAGS if closing in literal]

    @property
    def tags(self) -> tuple[str, str]:
        """The tags around thinking that the template itself has, or else the most common ones."""
        known = self.closing_tags
        return next((pair for pair in TAGS if pair[1] in known), TAGS[0])

    def _template(self, tools: bool = False) -> str:
        return self.tokenizer.get_chat_template(None, [{}] if tools else None)

    def _control_tokens(self, tools: bool = False) -> re.Pattern[str]:
        return _control_tokens(self.tokenizer, self._template(tools), len(self.tokenizer))

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        opens: bool,
    ) -> str:
        options = dict(self.options)
        tools = list(tools) or options.pop("tools", None) or []
        options.pop("tools", None)
        control = self._control_tokens(bool(tools))
        shown = [self._marked_message(message, control) for message in messages]
        return self.tokenizer.apply_chat_template(
            shown,
            tools=mark_control_tokens(list(tools), control) or None,
            tokenize=False,
            add_generation_prompt=opens,
            **mark_control_tokens(options, control),
        )

    def _marked_message(
        self, message: Mapping[str, Any], control: re.Pattern[str]
    ) -> dict[str, Any]:
        made = mark_control_tokens(dict(message), control)
        content = message.get("content")
        if message["role"] != "assistant" or not isinstance(content, str):
            return made
        stated = any(message.get(name) for name in THINKING)
        block = thinking_block(content, may_be_open=() if stated else self.closing_tags)
        if block is not None:
            # The same text, but its two tags are not marked.
            opening, closing = block.tags
            before, _, after = content.partition(closing)
            opened = before.lstrip().startswith(opening)
            inside = before.lstrip().removeprefix(opening) if opened else before
            inside, after = (mark_control_tokens(part, control) for part in (inside, after))
            made["content"] = f"{opening if opened else ''}{inside}{closing}{after}"
        return made

    def _check_tools(
        self,
        found: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        called = [call for message in messages for call in message.get("tool_calls") or ()]
        for what, several in (("tool calls", called), ("tools", tools)):
            for one in several:
                name = one.get("function", one).get("name")
                if isinstance(name, str) and self.marked(name) not in found:
                    raise DataError(
                        f"{self.place}: the chat template of '{self.tokenizer.name_or_path}' does "
                        f"not write {what} (such as '{name}'), so their meaning would be lost. "
                        "Use a tokenizer whose template supports tools, or drop the row."
                    )


@functools.lru_cache(maxsize=64)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, _size: int
) -> re.Pattern[str]:
    # `_size` is part of the key, because tokens can be added to a tokenizer.
    return _get_control_token_patterns(tokenizer._get_control_tokens(template))[0]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that finds the text of any special token, except tags of thinking."""
    known = (one.content for one in tokenizer.added_tokens_decoder.values() if one.special)
    tags = {tag for pair in TAGS for tag in pair}
    return _get_control_token_patterns(tuple(one for one in known if one not in tags))[0]


def _with_texts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with text for a missing content, and for the arguments of its calls."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call.get("function", call))
        if not isinstance(function.get("arguments", ""), str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function} if "function" in call else function)
    made = {**message, "content": message.get("content") or ""}
    return {**made, "tool_calls": calls} if calls else made


def end_in(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """Return the place of the token that ends an answer, in the ids of the answer and what follows.

    That is the tokenizer's end token or, if the template closes a turn with another token, the last
    special token.  Only the template can have written either, because control tokens in the text
    were encoded as ordinary text.  None means that neither is there.
    """
    if tokenizer.eos_token_id in ids:
        return list(ids).index(tokenizer.eos_token_id)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in special), None)


def template_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids with which the chat template ends an answer: one, or none without template."""
    template = getattr(tokenizer, "chat_template", None)  # not every tokenizer has one
    return frozenset() if template is None else _template_ends(tokenizer, str(template))


@functools.lru_cache(maxsize=64)
def _template_ends(tokenizer: PreTrainedTokenizerBase, _template: str) -> frozenset[int]:
    # `_template` is part of the key, because a user can replace the template of a tokenizer.
    chat = ChatTemplate(tokenizer)
    try:
        prompt = chat.text(_PROBE[:1], opens=False)
        whole = chat.text(_PROBE, opens=False)
    except DataError:  # it rejects this conversation, so it cannot be probed
        return frozenset()
    answer = chat.ids(whole.removeprefix(prompt))
    place = end_in(tokenizer, answer)
    return frozenset() if place is None else frozenset({answer[place]})
