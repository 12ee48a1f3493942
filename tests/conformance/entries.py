"""Every entry of every table, read from the table, so that a new entry is tested without a change.

An entry is a part of a recipe as a user would write it.  If a section cannot be built from its
defaults alone, REQUIRED gives the other fields that a test needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmdistill import recipe as recipes
from llmdistill.objectives.build import _BUILDERS as OBJECTIVES
from llmdistill.recipe.rollouts import RolloutSection
from llmdistill.rollouts.build import _BUILDERS as ROLLOUTS
from llmdistill.teachers.build import _BUILDERS as TEACHERS

# By the name of the field.  Models are those of `recipe`; tests put real ones in their place.
REQUIRED: dict[str, Any] = {
    "teachers": [{"model": "t", "name": "a"}, {"model": "t", "name": "b"}],
    "peers": [{"model": "s"}, {"model": "s"}],
    "column": "input",
    # A loss over more and more responses of a queue would rise while the student learns.
    "queue_size": 8,
}
NEW_TOKENS = 5


def _variants(sections: dict[type, Any]) -> Iterator[dict[str, Any]]:
    """Yield each section with its defaults, and with each entry of its tables in turn."""
    for section in sections:
        fields = section.model_fields
        given = {"kind": fields["kind"].default}
        given |= {name: value for name, value in REQUIRED.items() if name in fields}
        if "teachers" in given and "column" not in given:  # their teachers have no names
            given["teachers"] = [{"model": one["model"]} for one in given["teachers"]]
        yield given
        for field, table in section.CHOICES.items():
            others = (name for name in table.entries if name != fields[field].default)
            yield from (given | {field: name} for name in others)


def objectives() -> dict[str, dict[str, Any]]:
    return {
        _label({key: value for key, value in one.items() if key not in REQUIRED}): one
        for one in _variants(OBJECTIVES)
    }


def main_objectives() -> dict[str, dict[str, Any]]:
    """Every kind with its defaults, and every entry of `response`: what slow tests run."""
    return {
        name: one
        for name, one in objectives().items()
        if one["kind"] == "response" or set(one) - REQUIRED.keys() == {"kind"}
    }


def rollouts() -> dict[str, dict[str, Any]]:
    return {_label(one): shorter(one) for one in _variants(ROLLOUTS)}


def teachers() -> dict[str, dict[str, Any]]:
    return {_label(one): one for one in _variants(TEACHERS)}


def shorter(section: dict[str, Any]) -> dict[str, Any]:
    """Return the section with lengths cut to NEW_TOKENS, inner ones too, and a small buffer."""
    kind = next(one for one in ROLLOUTS if one.model_fields["kind"].default == section["kind"])
    cut = dict(section)
    for name, field in kind.model_fields.items():
        if name == "max_new_tokens":
            cut[name] = NEW_TOKENS
        elif name == "capacity":
            cut[name] = 4
        elif isinstance(field.default, RolloutSection):
            cut[name] = shorter({"kind": field.default.kind})
    return cut


def _label(section: dict[str, Any]) -> str:
    return "-".join(str(value) for value in section.values())


def recipe(**parts: Any) -> recipes.Recipe:
    """Return a recipe with these parts."""
    given = {
        "output": "run",
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "data": {"train": "train.jsonl"},
    }
    return recipes.build(given | parts)
