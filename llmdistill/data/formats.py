"""Converts rows in the formats that users have into one form: a conversation and its answer.

    messages            {"messages": [{"role": "user", "content": ...}, ...]}    any conversation
    conversations       {"conversations": [{"from": "human", "value": ...}]}     ShareGPT's
    prompt_completion   {"prompt": ..., "completion": ...}    text, or messages on both sides
    alpaca              {"instruction": ..., "input": ..., "output": ...}        input below
    text                {"text": ...}                         no turns: all of it is the answer

The answer can be missing if a model writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmdistill.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SENDERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A conversation to answer, its answer if it has one, and its place for error messages.

    The prompt ends with a message of the user or a tool.  It is empty for plain text, all of which
    is the response.
    """

    prompt: tuple[Message, ...]
    response: str | None
    place: str


def to_examples(
    row: Any, place: str, *, form: str = "auto", every_turn: bool = False
) -> list[Example]:
    """Convert one row into examples.  Raises DataError with place and field if it is malformed.

    With `every_turn` each answer of a conversation becomes an example, with all messages before it
    as the prompt.
    """
    # One example for each turn, and not one for the whole conversation: templates that drop the
    # thinking of earlier turns then render each answer as they do when the student is used.
    prompt, response = FORMATS[form_of(row, place, form)][1](row, place)
    last = Example(tuple(prompt), response, place)
    return [*_earlier_turns(last), last] if every_turn else [last]


def form_of(row: Any, place: str, form: str = "auto") -> str:
    """Return the name of a row's form: `form`, or for `auto` the first whose field it has.

    Raises DataError if the row is not a dict or has none of the fields.
    """
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be an object with fields, got {type(row).__name__}")
    if form != "auto":
        return form
    found = next((name for name, (key, _) in FORMATS.items() if key in row), None)
    if found is None:
        known = ", ".join(f"'{key}'" for key, _ in FORMATS.values())
        raise DataError(
            f"{place}: the row has none of the fields {known}; it has {_show(list(row))}. "
            "Map its fields with 'columns' of the source, as in columns: {prompt: question}."
        )
    return found


def _earlier_turns(last: Example) -> Iterator[Example]:
    """Yield the answers before the last message of a conversation, each after a user's message."""
    roles = [message["role"] for message in last.prompt]
    for turn, role in enumerate(roles):
        if role == "assistant" and "user" in roles[:turn]:
            yield Example(last.prompt[:turn], last.prompt[turn]["content"], last.place)


def _from_messages(row: dict[str, Any], place: str) -> tuple[list[Message], str | None]:
    return _conversation(_messages(row.get("messages"), "messages", place), "messages", place)


def _from_sharegpt(row: dict[str, Any], place: str) -> tuple[list[Message], str | None]:
    turns = row.get("conversations")
    if isinstance(turns, list):
        turns = [_sharegpt_turn(turn) for turn in turns]
    messages = _messages(turns, "conversations", place)
    return _conversation(messages, "conversations", place)


def _sharegpt_turn(turn: Any) -> Any:
    """Convert a ShareGPT turn into a message; `_message` refuses what is malformed."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    sender = turn["from"]
    role = SENDERS.get(sender, sender) if isinstance(sender, str) else sender
    return {"role": role, "content": turn.get("value")}


def _messages(value: Any, field: str, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: '{field}' must be a list of messages, got {_show(value)}")
    return [_message(message, f"{place}: '{field}[{i}]") for i, message in enumerate(value)]


def _conversation(
    messages: list[Message], field: str, place: str
) -> tuple[list[Message], str | None]:
    """Return the messages to answer, and the text of the last one if it is the answer."""
    response, last = None, messages[-1]["role"]
    if last == "assistant":
        response = messages.pop()["content"]
        if not response.strip():
            raise DataError(f"{place}: '{field}[{len(messages)}].content' is empty")
    elif last not in ("user", "tool"):
        raise DataError(
            f"{place}: '{field}' ends with role '{last}'; it must end with 'assistant' or 'user'"
        )
    if not any(message["role"] == "user" for message in messages):
        raise DataError(f"{place}: '{field}' has no message with role 'user'")
    return messages, response


def _message(message: Any, where: str) -> Message:
    # `where` has an open quote, so that a field of the message can follow: 'messages[0].role'.
    if not isinstance(message, dict):
        raise DataError(f"{where}' must be an object with role and content, got {_show(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}.role' must be one of {', '.join(ROLES)}, got {_show(role)}")
    if not isinstance(content, str):
        raise DataError(f"{where}.content' must be text, got {_show(content)}")
    return {"role": role, "content": content}


def _from_prompt(row: dict[str, Any], place: str) -> tuple[list[Message], str | None]:
    if not isinstance(row.get("prompt"), list):
        prompt = _text(row, "prompt", place)
        return [{"role": "user", "content": prompt}], _optional_text(row, "completion", place)
    messages = _messages(row["prompt"], "prompt", place)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: 'prompt' ends with role 'assistant'. Move that message to 'completion'."
        )
    # A completion that is missing, null or [] is a prompt without an answer.
    if row.get("completion"):
        answer = _messages(row["completion"], "completion", place)
        if [message["role"] for message in answer] != ["assistant"]:
            raise DataError(f"{place}: 'completion' must be one message with role 'assistant'")
        messages += answer
    return _conversation(messages, "prompt", place)


def _from_alpaca(row: dict[str, Any], place: str) -> tuple[list[Message], str | None]:
    instruction, extra = _text(row, "instruction", place), _optional_text(row, "input", place)
    content = f"{instruction}\n\n{extra}" if extra else instruction
    return [{"role": "user", "content": content}], _optional_text(row, "output", place)


def _from_text(row: dict[str, Any], place: str) -> tuple[list[Message], str | None]:
    return [], _text(row, "text", place)


# A reader returns the messages to answer and the answer, or None.  Each form has the field by which
# `auto` recognises it.  The order matters: the first field that a row has decides.
Reader = Callable[[dict[str, Any], str], tuple[list[Message], str | None]]

FORMATS: dict[str, tuple[str, Reader]] = {
    "messages": ("messages", _from_messages),
    "conversations": ("conversations", _from_sharegpt),
    "prompt_completion": ("prompt", _from_prompt),
    "alpaca": ("instruction", _from_alpaca),
    "text": ("text", _from_text),
}


def _text(row: dict[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: '{field}' must be non-empty text, got {_show(value)}")
    return value


def _optional_text(row: dict[str, Any], field: str, place: str) -> str | None:
    """Return the text of a field, or None if it is missing, null or blank."""
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: '{field}' must be text, got {_show(value)}")
    return value if value and value.strip() else None


def _show(value: Any) -> str:
    """Return the start of a value for a message: rows can be megabytes long."""
    text = repr(value)
    return f"{text[:40]}..." if len(text) > 43 else text
