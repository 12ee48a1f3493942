"""A name of a table, or a function of the user's own, with the options that it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from llmdistill.errors import RecipeError
from llmdistill.recipe.options import wrong_option
from llmdistill.recipe.tables import Bounds

Function = TypeVar("Function", bound=Callable[..., Any])


def choose(what: str, given: str | Function, table: Mapping[str, Function]) -> Function:
    """The entry of a table, or a callable as it is; RecipeError lists the names of the table."""
    if callable(given):
        return given
    if given not in table:
        raise RecipeError(
            f"unknown {what} '{given}'; choose one of {', '.join(table)}, or give a function"
        )
    return table[given]


def name_of(given: str | Callable[..., Any]) -> str:
    """What a choice is called in logs and errors."""
    return given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)


def option_names(function: Callable[..., Any]) -> list[str]:
    """The keyword-only parameters of a function: its options."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def bind(
    what: str,
    given: str | Function,
    table: Mapping[str, Function],
    options: dict[str, Any],
    bounds: Bounds | None = None,
) -> Function:
    """The chosen function with those of the options that it takes, which leave the dict.

    RecipeError for a name that the table does not have, or a value out of bounds.
    """
    function = choose(what, given, table)
    own = {name: options.pop(name) for name in option_names(function) if name in options}
    if wrong := wrong_option(what, name_of(given), own, list(own), bounds or {}):
        raise RecipeError(wrong)
    return functools.partial(function, **own) if own else function  # type: ignore[return-value]
