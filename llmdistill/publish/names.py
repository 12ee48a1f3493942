"""Names and text that may be shown to others: no local paths, no addresses, no markup."""

from __future__ import annotations

import html
import re
from typing import Any

from llmdistill import recipe as recipes
from llmdistill.recipe import Recipe
from llmdistill.uploads import public_part

PATHS = (  # keys that hold a path
    *("output", "source", "model", "tokenizer", "student", "folder", "image_folder"),
)


def public_model(name: str, *, is_remote: bool = True) -> str:
    """Return the name of a model that others can use, or the last part of a path.

    The names of a server can have many parts, but they can also be paths on its machine.
    """
    if not is_remote:
        return public_part(name)
    is_path = name.startswith((".", "/", "~")) or "\\" in name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if is_path else name


def public_dump(recipe: Recipe | recipes.GenerationRecipe) -> str:
    """Return the recipe as YAML without local paths and without the address of a server."""

    def public(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            kept = {name: one for name, one in value.items() if name not in ("url", "key_from")}
            is_remote = kept.get("kind") == "remote"
            # Options of a user's function can hold any path.
            inside = key if key in ("options", "training") else ""
            return {
                name: public_model(one)
                if is_remote and name == "model"
                else public(one, inside or name)
                for name, one in kept.items()
            }
        if isinstance(value, list):
            return [public(one, key) for one in value]
        if not isinstance(value, str):
            return value
        is_path = value.startswith(("/", "~", ".")) or "\\" in value
        if (
            key == "function"
            or (key == "options" and "/" in value)
            or (key in ("options", "training") and is_path)
        ):
            return re.split(r"[\\/]", value)[-1]
        return public_part(value) if key in PATHS else value

    return recipes.dump_data(public(recipes.as_data(recipe)))


def shown(text: str) -> str:
    """Return text from a recipe or another card as plain Markdown text.

    It cannot contain HTML tags, links or images, end a table cell, or start or end a code span.
    """
    plain = html.escape(text, quote=False).replace("`", "'").replace("\n", " ")
    return re.sub(r"([|\[\]])", r"\\\1", plain)


def fenced(text: str) -> str:
    """Return text that cannot close the code block around it."""
    return text.replace("```", "'''")
