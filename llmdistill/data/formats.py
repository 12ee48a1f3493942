"""Converts rows in the formats that users have into one form: a conversation and its answer.

    messages            {"messages": [{"role": "user", "content": ...}, ...]}    any conversation
    conversations       {"conversations": [{"from": "human", "value": ...}]}     ShareGPT's
    prompt_completion   {"prompt": ..., "completion": ...}    text, or messages on both sides
    alpaca              {"instruction": ..., "input": ..., "output": ...}        input below
    text                {"text": ...}                         no turns: all of it is the answer

The answer can be missing if a model writes it.  All conversations take `system` and `tools` from
the row, and `history` in Alpaca's form; Dolly's `context` and `response` are Alpaca's `input` and
`output`.  `unread` names the fields that nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llmdistill.data.tools import listed, shown, tool_calls, tools_of
from llmdistill.errors import DataError
from llmdistill.models.thinking import THINKING

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "function": "tool"}  # of OpenAI, newer and older
SENDERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

# What a message can hold for the chat template.  Fields in SAID are only for this file.
PASSED_ON = ("role", "content", "name", "tool_calls", "tool_call_id", *THINKING)
SAID = ("weight", "train", "function_call")

Message = dict[str, Any]
"""Role and content, which is text or None, and perhaps thinking and tool calls."""


@dataclass(frozen=True)
class Example:
    """A conversation to answer, its answer if it has one, and its place for error messages.

    The prompt ends with a message of the user or a tool.  It is empty for plain text, all of which
    is the response.  `more` are the answer's thinking and tool calls, and `tools` are those that
    the chat template describes.
    """

    prompt: tuple[Message, ...]
    response: str | None
    place: str
    more: Message = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def answer(self) -> Message:
        """The response as a message of the assistant."""
        return {"role": "assistant", "content": self.response, **self.more}


def to_examples(
    row: Any, place: str, *, form: str = "auto", every_turn: bool = False
) -> list[Example]:
    """Convert one row into examples.  Raises DataError with place and field if it is malformed.

    With `every_turn` each answer of a conversation becomes an example, with all messages before it
    as the prompt.  Answers that the row excludes with `weight: 0` or `train: false` become none.
    """
    # One example for each turn, and not one for the whole conversation: templates that drop the
    # thinking of earlier turns then render each answer as they do when the student is used.
    form = form_of(row, place, form)
    messages = FORMATS[form][1](row, place)
    tools: tuple[dict[str, Any], ...] = ()
    if form != "text":
        messages, tools = _with_system(messages, row, place), tools_of(row, place)
    places = [len(messages)]
    if messages[-1]["role"] == "assistant":
        places = [len(messages) - 1]
    if every_turn:
        places = [*_earlier_answers(messages), *places]
    clean = [{k: v for k, v in one.items() if k not in SAID} for one in messages]
    found = []
    for turn in places:
        answer = clean[turn] if turn < len(messages) else None
        if answer is None:
            found.append(Example(tuple(clean), None, place, {}, tools))
        elif messages[turn].get("train", True):
            more = {k: v for k, v in answer.items() if k not in ("role", "content")}
            if answer["content"] is None:
                more["content"] = None  # some templates tell a call alone by this
            text = answer["content"] or ""
            found.append(Example(tuple(clean[:turn]), text, place, more, tools))
    return found


def unread(row: dict[str, Any], form: str) -> list[str]:
    """Return the names of the fields of a row with a value that nothing reads.

    `form` is the row's own.  Fields of messages are named as in `messages[].id`.
    """
    known = {"system", "tools", *FIELDS[form]} if form != "text" else {"text"}
    if form == "prompt_completion" and row.get("completion") is not None:
        known -= {"response"}
    if form == "alpaca":  # the first of two names is read
        known -= {other for one, other in ALIASES.items() if row.get(one) is not None}
        known |= {name for name in (*ALIASES, *ALIASES.values()) if _is_blank(row.get(name))}
    key = FORMATS[form][0]
    value = row.get(key)
    turns: list[Any] = value if isinstance(value, list) else []
    if turns and isinstance(turns[0], dict) and _role(turns[0]) == "system":
        known -= {"system"}
    known |= ABOUT_A_ROW
    found = [str(name) for name, value in row.items() if name not in known and value is not None]
    of_messages = {*PASSED_ON, *SAID, *(("from", "value") if form == "conversations" else ())}
    inside = (
        f"{key}[].{name}"
        for turn in turns
        if isinstance(turn, dict)
        for name, value in turn.items()
        if name not in of_messages and value is not None
    )
    return list(dict.fromkeys([*found, *inside]))


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
            f"{place}: the row has none of the fields {known}; it has {shown(list(row))}. "
            "Map its fields with 'columns' of the source, as in columns: {prompt: question}."
        )
    return found


def _earlier_answers(messages: list[Message]) -> Iterator[int]:
    """Yield the places of the answers before the last message, each after a user's message."""
    roles = [message["role"] for message in messages]
    for turn, role in enumerate(roles[:-1]):
        if role == "assistant" and "user" in roles[:turn]:
            yield turn


def _with_system(messages: list[Message], row: dict[str, Any], place: str) -> list[Message]:
    """Return the messages after the row's own system message, if they do not start with one."""
    system = _optional_text(row, "system", place)
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _from_messages(row: dict[str, Any], place: str) -> list[Message]:
    messages = _messages(listed(row.get("messages")), "messages", place)
    return _conversation(messages, "messages", place)


def _from_sharegpt(row: dict[str, Any], place: str) -> list[Message]:
    turns = listed(row.get("conversations"))
    if isinstance(turns, list):
        turns = [_sharegpt_turn(turn) for turn in turns]
    messages = _messages(turns, "conversations", place)
    return _conversation(messages, "conversations", place)


def _sharegpt_turn(turn: Any) -> Any:
    """Convert a ShareGPT turn into a message; `_message` refuses what is malformed."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {**rest, "role": _role(turn), "content": turn.get("value")}


def _role(turn: dict[str, Any]) -> Any:
    """Return the role of a message or of a ShareGPT turn, as it is written there if unknown."""
    sender = turn.get("from", turn.get("role"))
    return SENDERS.get(sender, sender) if isinstance(sender, str) else sender


def _messages(value: Any, field: str, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: '{field}' must be a list of messages, got {shown(value)}")
    return [_message(message, f"{place}: '{field}[{i}]") for i, message in enumerate(value)]


def _conversation(messages: list[Message], field: str, place: str) -> list[Message]:
    """Return the messages if they end with a question or an answer, and have a question."""
    last = messages[-1]["role"]
    if last == "system":
        raise DataError(
            f"{place}: '{field}' ends with role '{last}'; it must end with 'assistant' or 'user'"
        )
    before = messages[:-1] if last == "assistant" else messages
    if not any(message["role"] == "user" for message in before):
        raise DataError(f"{place}: '{field}' has no message with role 'user'")
    return messages


def _message(message: Any, where: str) -> Message:
    # `where` has an open quote, so that a field of the message can follow: 'messages[0].role'.
    if not isinstance(message, dict):
        raise DataError(f"{where}' must be an object with role and content, got {shown(message)}")
    role, content = message.get("role"), _joined(message.get("content"), where)
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(f"{where}.role' must be one of {', '.join(ROLES)}, got {shown(role)}")
    made = {k: message[k] for k in PASSED_ON if message.get(k) is not None}
    made |= {"role": role, "content": content}
    calls = role == "assistant" and listed(made.get("tool_calls"))
    if role == "assistant" and not calls and isinstance(message.get("function_call"), dict):
        calls = [{"type": "function", "function": message["function_call"]}]  # OpenAI's older form
    if not calls:
        made.pop("tool_calls", None)
        if not isinstance(content, str):
            raise DataError(f"{where}.content' must be text, got {shown(content)}")
        # An empty answer would be learned as "say nothing", and an empty question answered.
        if role in ("user", "assistant") and not content.strip():
            raise DataError(f"{where}.content' is empty")
    else:
        made["tool_calls"] = tool_calls(calls, where)
    for name in THINKING:
        if not isinstance(made.get(name, ""), str):
            raise DataError(f"{where}.{name}' must be text, got {shown(made[name])}")
    return made if _is_trained(message, where) else made | {"train": False}


def _joined(content: Any, where: str) -> Any:
    """Return the text of a list of text parts, and anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataError(
                f"{where}.content' must be text or a list of text parts, got a part of type "
                f"{shown(kind)}"
            )
    return "".join(part["text"] for part in content)


def _is_trained(message: dict[str, Any], where: str) -> bool:
    """Whether a message is to be learned, by its `weight` (0 or 1) or `train` (true or false)."""
    for name in SAID[:2]:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise DataError(f"{where}.{name}' must be 0 or 1, false or true, got {shown(value)}")
        if value is not None and not value:
            return False
    return True


def _from_prompt(row: dict[str, Any], place: str) -> list[Message]:
    if not isinstance(row.get("prompt"), list):
        name = "completion" if row.get("completion") is not None else "response"
        return _turn(_text(row, "prompt", place), _optional_text(row, name, place))
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


def _from_alpaca(row: dict[str, Any], place: str) -> list[Message]:
    instruction, extra, output = alpaca_texts(row, place)
    content = f"{instruction}\n\n{extra}" if extra else instruction
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{place}: 'history' must be a list of [question, answer] pairs")
    pairs = [pair for pair in history if isinstance(pair, list | tuple) and len(pair) == 2]
    if len(pairs) < len(history):
        raise DataError(f"{place}: 'history' must be a list of [question, answer] pairs")
    earlier = [
        _message({"role": role, "content": text}, f"{place}: 'history[{i}]")
        for i, pair in enumerate(pairs)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*earlier, *_turn(content, output)]


def alpaca_texts(row: dict[str, Any], place: str) -> tuple[str, str | None, str | None]:
    """Return instruction, input and output of a row in Alpaca's or Dolly's form."""
    extra, output = (
        _optional_text(row, name if row.get(name) is not None else other, place)
        for name, other in ALIASES.items()
    )
    return _text(row, "instruction", place), extra, output


def _turn(question: str, answer: str | None) -> list[Message]:
    asked: Message = {"role": "user", "content": question}
    return [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]


def _from_text(row: dict[str, Any], place: str) -> list[Message]:
    return [{"role": "assistant", "content": _text(row, "text", place)}]


# A reader returns the messages of a row; the last one is the answer if it is the assistant's.  Each
# form has the field by which `auto` recognises it.  The order matters: the first field that a row
# has decides.
Reader = Callable[[dict[str, Any], str], list[Message]]

FORMATS: dict[str, tuple[str, Reader]] = {
    "messages": ("messages", _from_messages),
    "conversations": ("conversations", _from_sharegpt),
    "prompt_completion": ("prompt", _from_prompt),
    "alpaca": ("instruction", _from_alpaca),
    "text": ("text", _from_text),
}
ALIASES = {"input": "context", "output": "response"}  # Alpaca's names, and Dolly's
# The fields that each form reads, in addition to `system` and `tools`.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion", "response"),
    "alpaca": ("instruction", "history", *ALIASES, *ALIASES.values()),
    "text": ("text",),
}


# What `llmdistill generate` and the included seed tasks say about a row.  It is not for training.
ABOUT_A_ROW = frozenset(
    (
        *("id", "is_classification", "generator", "teacher", "revision", "sampling", "seed"),
        *("variant", "prompt_hash"),
    )
)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(row: dict[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: '{field}' must be non-empty text, got {shown(value)}")
    return value


def _optional_text(row: dict[str, Any], field: str, place: str) -> str | None:
    """Return the text of a field, or None if it is missing, null or blank."""
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: '{field}' must be text, got {shown(value)}")
    return value if value and value.strip() else None
