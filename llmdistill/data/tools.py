"""Tools and tool calls in rows, as objects or as JSON text."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from llmdistill.errors import DataError


def tools_of(row: dict[str, Any], place: str) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row: a list of objects, or the same as JSON text."""
    value = _from_json(row.get("tools"), "tools", place)
    if isinstance(value, list):
        value = [_from_json(one, "tools", place) if _is_object(one) else one for one in value]
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"{place}: 'tools' must be a list of objects, got {shown(value)}")
    return tuple(value)


def tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls with arguments as objects: OpenAI's API writes them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}.tool_calls' must be a list of objects, got {shown(calls)}")
    made = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}.tool_calls' has a call without a name, got {shown(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        if isinstance(arguments, dict):
            function = function | {"arguments": arguments}
        made.append({**call, "function": function} if "function" in call else function)
    return made


def listed(value: Any) -> Any:
    """Return the list in JSON text, as tables hold it, and anything else as it is."""
    is_json = isinstance(value, str) and value.lstrip().startswith("[")
    with contextlib.suppress(ValueError):
        return json.loads(value) if is_json else value
    return value


def _is_object(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")


def _from_json(value: Any, field: str, place: str) -> Any:
    """Return the value of JSON text, as tables hold lists and objects; others as they are."""
    if not isinstance(value, str) or value.strip() in ("", "None"):
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{place}: '{field}' is not valid JSON: {error}") from error


def shown(value: Any) -> str:
    """Return the start of a value for a message: rows can be megabytes long."""
    text = repr(value)
    return f"{text[:40]}..." if len(text) > 43 else text
