"""A method that is called as before, while its results are recorded."""

from __future__ import annotations

from typing import Any


def spy(target: Any, method: str) -> list[Any]:
    """Replace a method of one object; return the list to which each call adds its result."""
    results: list[Any] = []
    call = getattr(target, method)

    def record(*arguments: Any, **options: Any) -> Any:
        results.append(call(*arguments, **options))
        return results[-1]

    setattr(target, method, record)
    return results
