"""A method that is called as before, while its results are recorded."""

from __future__ import annotations

from typing import Any

import pytest


def spy(target: Any, method: str, patch: pytest.MonkeyPatch | None = None) -> list[Any]:
    """Replace a method of one object; return the list to which each call adds its result.

    With `patch` the method comes back when the patch is undone.
    """
    results: list[Any] = []
    call = getattr(target, method)

    def record(*arguments: Any, **options: Any) -> Any:
        results.append(call(*arguments, **options))
        return results[-1]

    (patch.setattr if patch else setattr)(target, method, record)
    return results
