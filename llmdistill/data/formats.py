"""Rows as users have them, turned into one form: a conversation to answer, and perhaps its answer.

    messages            {"messages": [{"role": "user", "content": ...}, ...]}    any conversation
    conversations       {"conversations": [{"from": "human", "value": ...}]}     ShareGPT's
    prompt_completion   {"prompt": ..., "completion": ...}    text, or messages on both sides
    alpaca              {"instruction": ..., "input": ..., "output": ...}        input below
    text                {"text": ...}                         no turns: all of it is the answer

The answer may be missing where a model writes it.
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
    """A conversation that ends with the user, the answer to it if there is one, and where it
    stood.  Plain text is an answer to no message at all.
    """

    prompt: tuple[Message, ...]
    response: str | None
    place: str


def to_examples(
    row: Any, place: str, *, form: str = "auto", every_turn: bool = False
) -> list[Example]:
    """One row in the common form; DataError with its place and field if it is malformed.

    With `every_turn` each answer of a conversation is an example, after all that came before it:
    templates that drop earlier turns' thinking render it as they will when the student is used.
    """
    prompt, response = FORMATS[form_of(row, place, form)][1](row, place)
    last = Example(tuple(prompt), response, place)
    return [*_earlier_turns(last), last] if every_turn else [last]


def form_of(row: Any, place: str, form: str = "auto") -> str:
    """The name of a row's form; `auto` goes by its fields."""
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
    """The answers that stand in a conversation before its last message."""
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
    """A turn of ShareGPT as a message; whatever else it is, for `_message` to refuse."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    sender = turn["from"]
    role = SENDERS.get(sender, sender) if isinstance(sender, str) else sender
    return {"role": role, "content": turn.get("value")}


def _messages(value: Any, field: str, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: '{field}' must be a list of messages, got {_show(value)}")
    return [_message(message, f"{place}: '{field}[{i}]'") for i, message in enumerate(value)]


def _conversation(
    messages: list[Message], field: str, place: str
) -> tuple[list[Message], str | None]:
    """The messages to answer, and the last one's text where it is the answer."""
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
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object with role and content, got {_show(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}.role must be one of {', '.join(ROLES)}, got {_show(role)}")
    if not isinstance(content, str):
        raise DataError(f"{where}.content must be text, got {_show(content)}")
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
    """The text of a field, or None where it is missing, null or empty."""
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: '{field}' must be text, got {_show(value)}")
    return value if value and value.strip() else None


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text[:40]}..." if len(text) > 43 else text
