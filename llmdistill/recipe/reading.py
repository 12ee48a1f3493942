"""Reading a recipe: YAML, dotted overrides, and saying what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llmdistill.errors import RecipeError
from llmdistill.recipe.base import Strict
from llmdistill.recipe.facts import close_to
from llmdistill.recipe.generation import GenerationRecipe
from llmdistill.recipe.schema import Recipe

Part = TypeVar("Part", bound=Strict)

NEVER_A_KEY = {
    "trust_remote_code": " llmdistill never runs code from a model's repository, because that code "
    "could do anything on this machine. Convert the model to an architecture of transformers."
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides `dotted.path=value`.  RecipeError says what is
    wrong.
    """
    data = _read(path, overrides)
    if command_of(data) == "generate":
        raise RecipeError(f"{path}: this recipe generates a dataset. Use llmdistill generate.")
    return build(data, str(path))


def load_generation(path: str | Path, overrides: Sequence[str] = ()) -> GenerationRecipe:
    """The same for a recipe of `llmdistill generate`."""
    data = _read(path, overrides)
    if command_of(data) == "train":
        raise RecipeError(f"{path}: this recipe trains a student. Use llmdistill train.")
    return build_part(GenerationRecipe, data, str(path))


def command_of(data: Mapping[str, Any]) -> str | None:
    """The command that runs a recipe, generate or train; None if its keys do not tell."""
    if "generator" in data:
        return "generate"
    return "train" if "student" in data else None


def _read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise RecipeError(
            f"no such recipe: {path}. Check the path, or run `llmdistill recipes copy` to get one."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not valid UTF-8: {error}. Convert it to UTF-8.") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path}: a recipe must be a mapping of keys to values, got {type(data).__name__}"
        )
    for override in overrides:
        _override(data, override)
    return data


def build(data: dict[str, Any], place: str = "recipe") -> Recipe:
    """A recipe from plain data; RecipeError with the dotted path of each mistake."""
    return build_part(Recipe, data, place)


def build_part(part: type[Part], data: dict[str, Any], place: str) -> Part:
    """One part of a recipe from plain data, in the same way."""
    try:
        return part.model_validate(data)
    except ValidationError as error:
        lines = [_describe(dict(item), data) for item in error.errors()]
        raise RecipeError(f"{place}: " + "\n".join(dict.fromkeys(lines))) from None


def dump(recipe: Recipe | GenerationRecipe) -> str:
    """The resolved recipe as YAML, defaults written out; reading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML without silent duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' appears twice in the mapping at line {line}"
                )
        return super().construct_mapping(node, deep)


# What people mean: 1e-4 is a number, and `no` is a word (YAML 1.1 reads it as false).
_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, place: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        raise RecipeError(f"{place}: not valid YAML: {error}") from None


def _override(data: dict[str, Any], override: str) -> None:
    """Puts one `dotted.path=value` into the data, making mappings on the way; lists must be
    there.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(
            f"override '{override}' is not of the form dotted.path=value. Write it as in "
            "training.max_steps=20."
        )
    value = parse_yaml(text, f"override '{override}'")
    *parents, last = path.split(".")
    target: Any = data
    for key in parents:
        if isinstance(target, list):
            target = target[_index(target, key, override)]
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RecipeError(
            f"override '{override}': '{'.'.join(parents)}' is {target!r}, not a mapping or list"
        )


def _index(items: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise RecipeError(
            f"override '{override}': '{key}' is not an index of a list of length {len(items)}"
        )
    return int(key)


def _describe(error: dict[str, Any], data: Any) -> str:
    """One validation error as: path, what is expected, what was given, what to do."""
    path = _dotted(error["loc"], data, missing=error["type"] == "missing")
    kind, context = error["type"], error.get("ctx", {})
    if kind == "unknown_key":
        key, known, renamed = context["key"], context["known"], context.get("renamed")
        hint = f" It is now called '{renamed}'." if renamed else NEVER_A_KEY.get(key)
        hint = hint or close_to(key, known) or f" Known keys: {', '.join(known)}."
        return f"unknown key '{f'{path}.{key}' if path else key}'.{hint}"
    if kind == "missing":
        return f"'{path}' is missing"
    if kind == "option":
        path = f"{path}.{context['key']}" if path else context["key"]
    if kind.startswith("union_tag"):
        given = error["input"].get("kind") if isinstance(error["input"], dict) else error["input"]
        known = context.get("expected_tags", "the known kinds").replace("'number', ", "")
        return f"'{path}.kind' should be one of {known}, got {given!r}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if kind == "pattern" or isinstance(error["input"], dict | BaseModel):  # it names its input
        return f"'{path}': {message}" if path else message
    return f"'{path}': {message}, got {error['input']!r} ({type(error['input']).__name__})"


def _dotted(location: Sequence[str | int], data: Any, *, missing: bool) -> str:
    """'objectives[0].beta': the steps that the user's own data takes.

    What pydantic adds (the kinds of a union, what a short form stands for) is left out.
    """
    path, here, named = "", data, False
    for number, step in enumerate(location):
        is_new = missing and number == len(location) - 1
        if isinstance(here, dict) and here.get("kind") == step and not named:
            named = True  # the kind of a union, though a key may be called the same
            continue
        named = False
        if isinstance(step, int) and isinstance(here, list):
            path += f"[{step}]"
            here = here[step]
        elif isinstance(here, dict) and (step in here or is_new):
            path += f"{'.' if path else ''}{step}"
            here = here.get(step)
    return path
