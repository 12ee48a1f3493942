"""Resolves a choice, which is a name in a table or a function, and binds its options."""

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
    """Return the entry of a table for a name; a callable is returned unchanged.

    Raises RecipeError, which lists the names of the table, for an unknown name.  `what` is the
    parameter that the error names.
    """
    if callable(given):
        return given
    if given not in table:
        raise RecipeError(
            f"unknown {what} '{given}'. Use one of {', '.join(table)}, or pass a function."
        )
    return table[given]


def name_of(given: str | Callable[..., Any]) -> str:
    """Return the name of a choice in logs and errors."""
    return given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)


def option_names(function: Callable[..., Any]) -> list[str]:
    """Return the options of a function, which are its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def bind(
    chosen: Mapping[str, tuple[Any, Mapping[str, Callable[..., Any]], Bounds]],
    options: Mapping[str, Any],
) -> list[Callable[..., Any]]:
    """Return the chosen functions, each with its own options bound.

    `chosen` maps a parameter, such as "divergence", to the choice, its table and the bounds of its
    options.  Raises RecipeError for an unknown name, for an option that no function or more than
    one function has, and for a value out of bounds.
    """
    functions = {what: choose(what, *one[:2]) for what, one in chosen.items()}
    # All options come from one flat mapping, so each must belong to exactly one function.
    for option in options:
        takers = [what for what, function in functions.items() if option in option_names(function)]
        if len(takers) > 1:
            raise RecipeError(
                f"option '{option}' is a parameter of the {' and of the '.join(takers)}. Rename "
                "it in one of your functions."
            )
        if not takers:
            # The error names the first choice, but lists the options of all of them.
            (what, (given, *_)), *_ = chosen.items()
            known = [name for function in functions.values() for name in option_names(function)]
            raise RecipeError(wrong_option(what, name_of(given), {option: None}, known, {}))
    bound: list[Callable[..., Any]] = []
    for what, (given, _, bounds) in chosen.items():
        names = option_names(functions[what])
        own = {name: value for name, value in options.items() if name in names}
        if wrong := wrong_option(what, name_of(given), own, names, bounds):
            raise RecipeError(wrong)
        bound.append(functools.partial(functions[what], **own) if own else functions[what])
    return bound
