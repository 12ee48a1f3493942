"""Sections that choose entries of tables by name, and can set the options of these entries.

In `{kind: response, divergence: jsd, beta: 0.1}`, `beta` is not a field of the section.  It is a
keyword of the function that DIVERGENCES names 'jsd', and its default is read from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import Bounds, Table

# Options are annotated in other files and arrive as text.  YAML writes 1 for 1.0, so a float option
# also takes an int.
TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
}


class TakesOptions(Strict):
    """A section whose fields name entries of CHOICES, and which takes the options of these entries.

    Options that are not set get their defaults, so that a dumped recipe shows every value.
    """

    # Options are not declared as fields, so pydantic must keep them as extra values.  Unknown keys
    # are still refused, by `_known_keys_only` of the base class.
    model_config = ConfigDict(extra="allow")

    @classmethod
    def known_keys(cls) -> list[str]:
        choices = [(table, entry) for table in cls.CHOICES.values() for entry in table.entries]
        found = [name for table, entry in choices for name in table.options(entry)]
        return list(dict.fromkeys([*cls.model_fields, *found]))

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        # `top_k: null` counts as not set.
        said = {name: value for name, value in given.items() if value is not None}
        defaults: dict[str, Any] = {}
        for field, table in cls.CHOICES.items():
            entry = said.get(field, cls.model_fields[field].default)
            if entry in table.entries:
                options = table.options(entry).items()
                defaults |= {name: p.default for name, p in options if name not in cls.model_fields}
        return defaults | said

    @model_validator(mode="after")
    def _check_options(self) -> Any:
        for name in self.model_extra or {}:
            # pydantic locates the error at the section, so the error carries the key.
            if wrong := self._wrong(name):
                raise PydanticCustomError("option", "{wrong}", {"wrong": wrong, "key": name})
        return self

    def _wrong(self, name: str) -> str | None:
        """Return what is wrong with an option that was set, or None."""
        value = getattr(self, name)
        chosen = [(field, table, getattr(self, field)) for field, table in self.CHOICES.items()]
        takers = [one for one in chosen if name in one[1].options(one[2])]
        if len(takers) > 1:
            fields = " and ".join(one[0] for one in takers)
            return f"it is ambiguous, because {fields} both take it. Choose another value for one."
        field, table, entry = takers[0] if takers else self._meant(name, chosen)
        known = table.options(entry)
        if name in known:
            types = TYPES.get(known[name].annotation)
            a_bool_for_a_number = isinstance(value, bool) and types != (bool,)  # a bool is an int
            if types and (a_bool_for_a_number or not isinstance(value, types)):
                return f"should be {known[name].annotation}, got {value!r}"
        return wrong_option(field, entry, {name: value}, list(known), table.bounds)

    def _meant(self, name: str, chosen: Sequence[tuple[str, Table, str]]) -> tuple[str, Table, str]:
        """Return the choice that would take this option with a different entry, for the error."""
        return next(
            one for one in chosen if any(name in one[1].options(other) for other in one[1].entries)
        )

    def options(self) -> dict[str, Any]:
        """Return the options of the chosen entries, by name."""
        return dict(self.model_extra or {})


def wrong_option(
    what: str, entry: str, options: Mapping[str, Any], known: Sequence[str], bounds: Bounds
) -> str | None:
    """Return the first mistake in the options of an entry that takes the `known` ones, or None.

    `what` names the field in the message, such as 'divergence'.  `bounds` are those of `Table`.
    """
    for option, value in options.items():
        if option not in known:
            has = f"Its options are: {', '.join(known)}." if known else "It has no options."
            return f"{what} '{entry}' has no option '{option}'. {has}"
        low, high = bounds.get((entry, option), (None, None))
        too_low, too_high = low is not None and value < low, high is not None and value > high
        if too_low or too_high:
            wanted = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
            return f"'{option}' of {what} '{entry}' should be {wanted}, got {value:g}"
    return None
