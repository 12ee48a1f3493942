"""Rows as users have them, turned into one form: a conversation to answer, and perhaps its answer.

    messages            {"messages": [{"role": "user", "content": ...}, ...]}    any conversation
    prompt_completion   {"prompt": ..., "completion": ...}                       one turn each
    alpaca              {"instruction": ..., "input": ..., "output": ...}        input below

The answer may be missing where a model writes it.  Sources are a local .jsonl file, a data set of
the Hub (`org/name` or `org/name:split`), and `seed_tasks`, the package's own 175 instructions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmdistill.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SEED_TASKS = "seed_tasks"

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the user, the answer to it if there is one, and where it
    stood.
    """

    prompt: tuple[Message, ...]
    response: str | None
    place: str


def read(source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a source, each with its place (`train.jsonl:214`), as they are in the file."""
    if source == SEED_TASKS:
        text = files("llmdistill.instruct").joinpath("seeds.jsonl").read_text(encoding="utf-8")
        yield from _json_lines(text, SEED_TASKS)
    elif source.endswith((".jsonl", ".json")):
        path = Path(source).expanduser()
        if not path.is_file():
            raise DataError(f"no such file: {source}")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is not UTF-8: {error}. Convert it to UTF-8.") from error
        yield from _json_lines(text, source)
    else:
        yield from _hub_rows(source)


def to_example(row: Any, place: str, *, form: str = "auto") -> Example:
    """One row in the common form; DataError with its place and field if it is malformed."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be an object with fields, got {type(row).__name__}")
    if form == "auto":
        form = next((name for name, (key, _) in FORMATS.items() if key in row), "")
        if not form:
            known = ", ".join(f"'{key}'" for key, _ in FORMATS.values())
            raise DataError(
                f"{place}: none of the fields {known} in the row; it has {_show(list(row))}"
            )
    prompt, response = FORMATS[form][1](row, place)
    return Example(tuple(prompt), response, place)


def _from_messages(row: dict[str, Any], place: str) -> tuple[list[Message], str | None]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: 'messages' must be a list of messages, got {_show(messages)}")
    clean = [_message(message, f"{place}: 'messages[{i}]'") for i, message in enumerate(messages)]
    last = clean[-1]["role"]
    if last == "assistant":
        response = clean.pop()["content"]
        if not response.strip():
            raise DataError(f"{place}: 'messages[{len(clean)}].content' is empty")
    elif last in ("user", "tool"):
        response = None
    else:
        raise DataError(
            f"{place}: 'messages' ends with role '{last}'; it must end with 'assistant' or 'user'"
        )
    if not any(message["role"] == "user" for message in clean):
        raise DataError(f"{place}: 'messages' has no message with role 'user'")
    return clean, response


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
    prompt = _text(row, "prompt", place)
    return [{"role": "user", "content": prompt}], _optional_text(row, "completion", place)


def _from_alpaca(row: dict[str, Any], place: str) -> tuple[list[Message], str | None]:
    instruction, extra = _text(row, "instruction", place), _optional_text(row, "input", place)
    content = f"{instruction}\n\n{extra}" if extra else instruction
    return [{"role": "user", "content": content}], _optional_text(row, "output", place)


Reader = Callable[[dict[str, Any], str], tuple[list[Message], str | None]]

FORMATS: dict[str, tuple[str, Reader]] = {
    "messages": ("messages", _from_messages),
    "prompt_completion": ("prompt", _from_prompt),
    "alpaca": ("instruction", _from_alpaca),
}


def _text(row: dict[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: '{field}' must be text that is not empty, got {_show(value)}")
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


def _json_lines(text: str, source: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin, which end no line in a file.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = DataError(f"{place}: not a line of JSON: {error}")
        yield place, row


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, split = source.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise DataError(
            f"cannot load data set '{source}': {type(error).__name__}: {error}. Give a local "
            ".jsonl file, or a data set of the Hub as org/name or org/name:split."
        ) from error
    for number, row in enumerate(rows):
        yield f"{source}[{number}]", row
