"""Reading recipes: YAML, dotted overrides, and one clear message for each mistake."""

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


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a training recipe from a YAML file and apply overrides of the form `dotted.path=value`.

    Raises RecipeError with every mistake and its dotted path, or if the file is a recipe of
    `llmdistill generate`.
    """
    data = _read(path, overrides)
    if command_of(data) == "generate":
        raise RecipeError(f"{path}: this recipe generates a dataset. Use llmdistill generate.")
    return build_part(Recipe, _with_texts(Recipe, data, overrides), str(path))


def load_generation(path: str | Path, overrides: Sequence[str] = ()) -> GenerationRecipe:
    """Read a recipe of `llmdistill generate`, in the same way as `load`."""
    data = _read(path, overrides)
    if command_of(data) == "train":
        raise RecipeError(f"{path}: this recipe trains a student. Use llmdistill train.")
    data = _with_texts(GenerationRecipe, data, overrides)
    return build_part(GenerationRecipe, data, str(path))


def command_of(data: Mapping[str, Any]) -> str | None:
    """Return the command that runs a recipe, generate or train; None if its keys fit neither."""
    if "generator" in data:
        return "generate"
    return "train" if "student" in data else None


def _read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise RecipeError(
            f"no such recipe: {path}. Check the path. `llmdistill recipes list` shows the recipes "
            "that you can copy."
        )
    try:
        # utf-8-sig: editors on Windows can add a byte order mark.
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
    """Build a training recipe from plain data.

    Raises RecipeError with the dotted path of each mistake; `place` starts the message.
    """
    return build_part(Recipe, data, place)


def build_part(part: type[Part], data: dict[str, Any], place: str) -> Part:
    """Build one part of a recipe from plain data, in the same way as `build`."""
    try:
        return part.model_validate(data)
    except ValidationError as error:
        lines = [_describe(dict(item), data) for item in error.errors()]
        # Several members of a union can report the same mistake; each line is shown once.
        raise RecipeError(f"{place}: " + "\n".join(dict.fromkeys(lines))) from None


def dump(recipe: Recipe | GenerationRecipe) -> str:
    """Return the recipe as YAML with all defaults; reading it gives an equal recipe."""
    return dump_data(as_data(recipe))


def as_data(recipe: Recipe | GenerationRecipe) -> dict[str, Any]:
    """Return the recipe as plain data with all defaults, without nulls that are the default."""

    def plain(part: Any, data: Any) -> Any:
        if isinstance(part, list):
            return [plain(*pair) for pair in zip(part, data, strict=True)]
        if not isinstance(part, Strict):
            return data
        fields = type(part).model_fields
        return {
            name: plain(getattr(part, name), value)
            for name, value in data.items()
            if value is not None or fields[name].default is not None
        }

    found: dict[str, Any] = plain(recipe, recipe.model_dump(mode="json"))
    return found


def dump_data(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML, with its keys in their order."""
    return yaml.safe_dump(data, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate keys, which PyYAML would silently overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' appears twice in the mapping at line {line}"
                )
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1: it reads 1e-4 as text, because it expects 1.0e-4, and `no` as false.
# People mean a number, and a word as in `save_strategy: no`.
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
    """Parse one YAML document.  Raises RecipeError, which starts with `place`."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    # ValueError: PyYAML's own constructors fail for text that only looks like a date or a number.
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{place}: not valid YAML: {error}") from None


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `dotted.path=value` in the data; missing mappings are created, list items are not."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(
            f"override '{override}' is not of the form dotted.path=value. Write it as in "
            "training.max_steps=20."
        )
    _set(data, path, _override_value(text, override), override)


def _set(data: dict[str, Any], path: str, value: Any, override: str) -> None:
    """Set the value at a dotted path; errors name the override."""
    *parents, last = path.split(".")
    target: Any = data
    for key in parents:
        if isinstance(target, list):
            target = target[_index(target, key, override)]
        elif isinstance(target, dict):
            # An override can set a key of a section that the file leaves out.
            target = target.setdefault(key, {})
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RecipeError(
            f"override '{override}': '{'.'.join(parents)}' is {target!r}, not a mapping or list"
        )


def _with_texts(
    part: type[Strict], data: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the data, with what a user typed for a text field as that text.

    YAML reads `hint=Answer: briefly` as a mapping and `output=2024` as a number.
    """
    typed = dict(override.split("=", 1) for override in overrides)
    try:
        part.model_validate(data)
    except ValidationError as error:
        found: list[dict[str, Any]] = [dict(one) for one in error.errors()]
        for one in found:
            path = _dotted(one["loc"], data, missing=False)
            if one["type"] == "option":
                path = f"{path}.{one['ctx']['key']}"
            is_text = one["type"] == "string_type" or "should be str" in one["msg"]
            if is_text and path in typed:
                _set(data, path, typed[path], path)
    return data


def _override_value(text: str, override: str) -> Any:
    """Return the value of an override: YAML, but `#` starts no comment.

    A pattern such as `#### (.*)` would otherwise be read as nothing at all.
    """
    value = parse_yaml(text, f"override '{override}'")
    is_plain = value is None or (isinstance(value, str) and text.strip()[:1] not in ("'", '"'))
    return text if "#" in text and is_plain else value


def _index(items: list[Any], key: str, override: str) -> int:
    # isdecimal also refuses -1, which Python would take for the last item.
    if not key.isdecimal() or int(key) >= len(items):
        raise RecipeError(
            f"override '{override}': '{key}' is not an index of a list of length {len(items)}"
        )
    return int(key)


def _describe(error: dict[str, Any], data: Any) -> str:
    """Return one validation error as a sentence: path, what is expected, what was given."""
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
    if kind == "entry":
        names, close = context["names"], context["close"]
        return f"'{path}' should be one of {names}, got {error['input']!r}.{close}"
    if kind.startswith("union_tag"):
        given = error["input"].get("kind") if isinstance(error["input"], dict) else error["input"]
        # 'number' is the tag of a plain number in a `Weight`, and not a kind that anyone writes.
        known = context.get("expected_tags", "the known kinds").replace("'number', ", "")
        return f"'{path}.kind' should be one of {known}, got {given!r}"
    # pydantic starts its messages with a capital letter; here they continue a sentence.
    message = (error["msg"][0].lower() + error["msg"][1:]).removeprefix("input ")
    # The message of a pattern names it already, and a whole section would be too long to show.
    if kind == "pattern" or isinstance(error["input"], dict | BaseModel):
        return f"'{path}': {message}" if path else message
    return f"'{path}': {message}, got {error['input']!r} ({type(error['input']).__name__})"


def _dotted(location: Sequence[str | int], data: Any, *, missing: bool) -> str:
    """Return a location as the user would write it: 'objectives[0].beta'.

    Steps that pydantic adds are left out: the kinds of a union, and the long form of a short one.
    """
    path, here, named = "", data, False
    for number, step in enumerate(location):
        is_new = missing and number == len(location) - 1
        if isinstance(here, dict) and here.get("kind") == step and not named:
            # This step is the tag of a union.  It is skipped once only, because a key can have the
            # same name: `generator: {kind: answer}` has had a key `answer`.
            named = True
            continue
        named = False
        if isinstance(step, int) and isinstance(here, list):
            path += f"[{step}]"
            here = here[step]
        elif isinstance(here, dict) and (step in here or is_new):
            path += f"{'.' if path else ''}{step}"
            here = here.get(step)
    return path
