"""Write conversations with the chat template of a tokenizer, as text and as ids.

Control tokens in the text of a message are encoded as ordinary text, so that only the template can
open or close a turn.  The one exception is a block of thinking at the start of an assistant's
message: its tags are the template's own, whichever way a row states the thinking.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_END,
    _CONTROL_TOKEN_START,
    _get_control_token_patterns,
    _get_template_literal_text,
    mark_control_tokens,
)

from llmdistill.errors import DataError
from llmdistill.models.limits import RENDERING, time_limit
from llmdistill.models.thinking import TAGS, THINKING, thinking_block

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)  # around control tokens in a message
# What a template writes after each answer is the same short text in every row.
SHORT, MOST_SHORT_TEXTS = 64, 256
_SHORT_TEXTS: dict[Any, list[int]] = {}
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
            found = self._as_taken(messages, tools, opens)
        except Exception as error:  # a template can raise any exception, jinja2's or its own
            raise DataError(
                f"{self.place}: the chat template rejects this conversation: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._check_tools(messages, tools, opens)
        return found

    def _as_taken(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        opens: bool,
    ) -> str:
        """Return a rendering of messages in the first form that the template takes.

        Some templates join the content, and some the arguments of a call, to other text.
        """
        forms = (dict, _with_content, _with_text_arguments)
        for form in forms[:-1]:
            with contextlib.suppress(Exception):
                return self._rendered([form(one) for one in messages], tools, opens)
        return self._rendered([forms[-1](one) for one in messages], tools, opens)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a rendered conversation.  Raises DataError if it is no Unicode."""
        try:
            # Without marks there is nothing to encode as text, and this way takes half the time.
            if not any(mark in text for mark in MARKS):
                return self.tokenizer.encode(text, add_special_tokens=False)
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
        if len(text) > SHORT:
            return self._ids_after(text)
        key = (self.tokenizer, len(self.tokenizer), text)  # tokens can be added to a tokenizer
        if key not in _SHORT_TEXTS:
            _SHORT_TEXTS[key] = self._ids_after(text)
            if len(_SHORT_TEXTS) > MOST_SHORT_TEXTS:
                _SHORT_TEXTS.pop(next(iter(_SHORT_TEXTS)))
        return list(_SHORT_TEXTS[key])

    def _ids_after(self, text: str) -> list[int]:
        # After a newline, because some tokenizers write a space before the start of a text.
        newline, found = self.ids("\n"), self.ids(f"\n{text}")
        continues = found[: len(newline)] == newline
        return found[len(newline) :] if continues else self.ids(text)

    def marked(self, value: Any) -> Any:
        """Return a text, or texts within lists and dicts, with marks around control tokens."""
        return mark_control_tokens(value, self._control_tokens())

    @property
    def closing_tags(self) -> list[str]:
        """The closing tags of thinking that the template contains."""
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
        with time_limit(RENDERING):
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
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        opens: bool,
    ) -> None:
        """Raise DataError if the template leaves out a tool or a tool call."""
        if not tools and not any(message.get("tool_calls") for message in messages):
            return
        names: list[tuple[str, str, str]] = []  # a stand-in, what it stands for, and its name

        def renamed(what: str, one: Mapping[str, Any]) -> dict[str, Any]:
            function = one.get("function", one)
            stand_in = f"tool{len(names)}x{len(names) * 7919}"
            names.append((stand_in, what, str(function.get("name"))))
            made = {**function, "name": stand_in}
            return {**one, "function": made} if "function" in one else made

        other_tools = [renamed("tools", one) for one in tools]
        others = [
            {**m, "tool_calls": [renamed("tool calls", call) for call in m["tool_calls"]]}
            if m.get("tool_calls")
            else m
            for m in messages
        ]
        found = self._as_taken(others, other_tools, opens)
        for stand_in, what, name in names:
            if stand_in not in found:
                raise DataError(
                    f"{self.place}: the chat template of '{self.tokenizer.name_or_path}' does not "
                    f"write {what} (such as '{name}'), so their meaning would be lost. Use a "
                    "tokenizer whose template supports tools, or drop the row."
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


def _with_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with an empty text for a missing content."""
    return {**message, "content": message.get("content") or ""}


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with a content, and with the arguments of its calls as JSON text."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call.get("function", call))
        if not isinstance(function.get("arguments", ""), str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function} if "function" in call else function)
    made = _with_content(message)
    return {**made, "tool_calls": calls} if calls else made


def end_in(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], after: Sequence[int] = ()
) -> int | None:
    """Return the place of the token that ends an answer, in the ids of the answer and what follows.

    `after` are the last of these ids, which the template writes after the answer's text: the end is
    in the first run of special tokens there, at the tokenizer's end token or else at the last of
    the run.  Without them it is the first end token, or else the last special token.  Only the
    template can have written these, because control tokens in the text were encoded as ordinary
    text.  None means that there is none.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {tokenizer.eos_token_id}
    if after and list(ids[-len(after) :]) == list(after):
        start = len(ids) - len(after)
        first = next((i for i in range(start, len(ids)) if ids[i] in special), None)
        if first is not None:
            places = itertools.takewhile(lambda i: ids[i] in special, range(first, len(ids)))
            run = list(places)
            return next((i for i in run if ids[i] == tokenizer.eos_token_id), run[-1])
    if tokenizer.eos_token_id in ids:
        return list(ids).index(tokenizer.eos_token_id)
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
        whole = chat.text(_PROBE, opens=False)
    except DataError:  # it rejects this conversation, so it cannot be probed
        return frozenset()
    said = _PROBE[1]["content"]
    after = chat.ids_after(whole.rpartition(said)[2]) if said in whole else []
    place = end_in(tokenizer, after, after)
    return frozenset() if place is None else frozenset({after[place]})
