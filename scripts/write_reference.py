"""Write the pages of docs/reference/ that are generated: every recipe key, and every command.

    python scripts/write_reference.py

Keys, types, bounds and defaults come from the schema of recipes, meanings from the docstring under
each field and from those of the functions that a name chooses. A test compares the pages with what
this script would write, so a key cannot be added without its description.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill.recipe import GenerationRecipe, Recipe
from llmdistill.recipe.facts import OWNED, REFUSED, RENAMED
from llmdistill.recipe.options import TakesOptions
from llmdistill.recipe.tables import REQUIRED, Parameter, Table

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
ARGUMENTS = (
    "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)


# ---- recipe keys ----


def recipe_page() -> str:
    """The page of all recipe keys, as Markdown."""
    parts = [
        "# Every recipe key",
        "This page is generated from the schema of recipes by `scripts/write_reference.py`.",
        "A recipe is strict: an unknown key or a value of another type is an error that names the "
        "key. The command line can replace any key by its dotted path:\n"
        "`llmdistill train recipe.yaml training.max_steps=50 objectives.0.weight=0.5`.",
    ]
    seen = {GenerationRecipe.__name__}  # a training recipe can hold one under `generate`
    for command, root in (("train", Recipe), ("generate", GenerationRecipe)):
        parts.append(
            f'<a id="{anchor(root.__name__)}"></a>\n\n## Recipes of `llmdistill {command}`'
        )
        parts += sections(root, "", seen)
        if command == "train":
            parts.append(training_section())
    return "\n\n".join(parts) + "\n"


def sections(cls: type[BaseModel], path: str, seen: set[str]) -> Iterator[str]:
    """A section with its keys, and then the sections inside it, each of them once."""
    seen.add(cls.__name__)
    schema = schemas()[cls.__name__]
    kind = schema["properties"].get("kind", {}).get("const")
    if path:
        title = f"`{path}`" + (f" of kind `{kind}`" if kind else "")
        yield f'<a id="{anchor(cls.__name__)}"></a>\n\n### {title}'
    if text := docstring(cls):
        yield text
    rows = [row(cls, name, value, schema) for name, value in schema["properties"].items()]
    if rows := [line for line in rows if line]:
        head = ["| key | type | default | meaning |", "|---|---|---|---|"]
        yield "\n".join(head + rows)
    if issubclass(cls, TakesOptions):
        for field, table in cls.CHOICES.items():
            yield from entries(field, table)
    for name, value in schema["properties"].items():
        for other in references(value):
            if other not in seen:
                yield from sections(classes()[other], f"{path}.{name}".lstrip("."), seen)


def row(
    cls: type[BaseModel], name: str, value: Mapping[str, Any], schema: Mapping[str, Any]
) -> str:
    if name == "kind":
        return ""
    required = name in schema.get("required", ())
    text = meaning(cls, name)
    if required:
        default = "see right" if "The default is" in text else "required"
    else:
        default = shown_default(value.get("default"), value)
    return f"| `{name}` | {shown_type(value)} | {default} | {cell(text)} |"


def entries(field: str, table: Table) -> Iterator[str]:
    """The names that a field can have, with their options."""
    module = importlib.import_module(f"llmdistill.{table.path[:-3].replace('/', '.')}")
    lines = [f"| `{field}` | options | meaning |", "|---|---|---|"]
    for entry in table.entries:
        known = table.options(entry)
        # A temperature is a key of the section, whatever the divergence is.
        names = [name for name in known if name != "temperature"]
        options = "<br>".join(shown_option(table, entry, name, known[name]) for name in names)
        text = inspect.getdoc(getattr(module, table.name)[entry]) or ""
        lines.append(f"| `{entry}` | {options or 'none'} | {cell(first_paragraph(text))} |")
    yield "\n".join(lines)


def shown_option(table: Table, entry: str, name: str, option: Parameter) -> str:
    low, high = table.bounds.get((entry, name), (None, None))
    limits = "" if low is None else f", at least {low:g}"
    if high is not None:
        limits = f", {low:g} to {high:g}"
    default = "required" if option.default is REQUIRED else f"default {inline(option.default)}"
    return f"`{name}`: {option.annotation}{limits}, {default}"


def training_section() -> str:
    """Which keys of TrainingArguments llmdistill sets, refuses or knows by another name."""
    rows = [(key, f"set by llmdistill. {use}") for key, use in OWNED.items()]
    rows += [(key, f"refused: {why}") for key, why in REFUSED.items()]
    rows += RENAMED.items()
    table = ["| key | what to do |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in rows)]
    return "\n\n".join(
        (
            "### `training`",
            f"Every field of [transformers.TrainingArguments]({ARGUMENTS}), except these:",
            "\n".join(table),
            "llmdistill sets `report_to: none` and `logging_steps: 1` unless the recipe sets them, "
            "and `bf16: true` if the device multiplies bfloat16 natively.",
        )
    )


@functools.cache
def schemas() -> dict[str, Any]:
    """The JSON schema of every section, by the name of its class."""
    found: dict[str, Any] = {}
    for root in (Recipe, GenerationRecipe):
        schema = root.model_json_schema()
        found |= schema["$defs"] | {root.__name__: schema}
    return found


@functools.cache
def classes() -> dict[str, type[BaseModel]]:
    """Every section class by its name."""

    def below(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    return {
        cls.__name__: cls for cls in below(BaseModel) if cls.__module__.startswith("llmdistill")
    }


def references(value: Any) -> Iterator[str]:
    """The names of the sections that a schema refers to."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "$ref":
                yield inner.rpartition("/")[2]
            elif key not in ("discriminator", "default"):
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def shown_type(value: Mapping[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        kind = schemas()[name]["properties"].get("kind", {}).get("const")
        return f"[{kind or 'section'}](#{anchor(name)})"
    for key in ("oneOf", "anyOf"):
        if key in value:
            return " or ".join(dict.fromkeys(shown_type(one) for one in value[key]))
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    kind = value.get("type", "any")
    if kind == "array":
        items = shown_type(value["items"]).replace("list of", "lists of")
        return f"list of {items}{'s' if items in ('string', 'integer', 'number') else ''}"
    names = {"object": "mapping", "boolean": "true or false", "null": "null"}
    return names.get(kind, kind) + bounds(value)


def bounds(value: Mapping[str, Any]) -> str:
    words = {
        "exclusiveMinimum": "above",
        "minimum": "at least",
        "exclusiveMaximum": "below",
        "maximum": "at most",
    }
    found = [f"{word} {value[key]:g}" for key, word in words.items() if key in value]
    return f", {', '.join(found)}" if found else ""


def shown_default(default: Any, value: Mapping[str, Any]) -> str:
    if isinstance(default, dict) and any(references(value)):
        return shown_section(default, next(references(value)))
    if isinstance(default, list) and default and isinstance(default[0], dict):
        first = default[0]
        return f"`[{{kind: {first['kind']}}}]`" if "kind" in first else f"`{first.get('source')}`"
    return inline(default)


def shown_section(default: Mapping[str, Any], name: str) -> str:
    """The kind of a default section, or what differs from the defaults of its keys."""
    if "kind" in default:
        return inline({"kind": default["kind"]})
    keys = schemas()[name]["properties"]
    changed = {key: one for key, one in default.items() if one != keys[key].get("default")}
    return inline(changed) if changed else "its defaults"


def inline(value: Any) -> str:
    """A value as YAML in one line."""
    text = json.dumps(value) if isinstance(value, str) and not value else ""
    text = text or yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f"`{text.removesuffix('...').strip()}`"


def docstring(cls: type[BaseModel]) -> str:
    own = cls.__doc__ if "__doc__" in vars(cls) else None
    return inspect.cleandoc(own) if own else ""


def meaning(cls: type[BaseModel], name: str) -> str:
    """The text under the field in the class that declares it, or in one of its bases."""
    for base in cls.__mro__:
        if issubclass(base, BaseModel) and (text := field_texts(base).get(name)):
            return text
    raise SystemExit(f"{cls.__name__}.{name} has no docstring under it")


@functools.cache
def field_texts(cls: type[BaseModel]) -> dict[str, str]:
    """The string literals under the fields of a class."""
    if not cls.__module__.startswith("llmdistill"):
        return {}
    (tree,) = ast.parse(inspect.cleandoc(f"\n{inspect.getsource(cls)}")).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and is_text:
            found[ast.unparse(field.target)] = inspect.cleandoc(text.value.value)
    return found


def anchor(name: str) -> str:
    return (name.removesuffix("Recipe") or name).lower()


def cell(text: str) -> str:
    """Return text that fits into one cell of a table: one line, with `|` escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def first_paragraph(text: str) -> str:
    return text.partition("\n\n")[0]


# ---- commands ----


def commands_page() -> str:
    """The page of all commands with their options, as Markdown."""
    import typer.main

    from llmdistill.cli import app

    group = typer.main.get_command(app)
    parts = [
        "# Every command",
        "This page is generated by `scripts/write_reference.py`. `llmdistill COMMAND --help` "
        "prints the same text.",
    ]
    for name, command in group.commands.items():
        inner = getattr(command, "commands", {})
        commands = {f"{name} {key}": one for key, one in inner.items()} or {name: command}
        for words, one in commands.items():
            parts += command_section(words, one)
    return "\n\n".join(parts) + "\n"


def command_section(words: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    yield f"## `llmdistill {words}`"
    yield " ".join((command.help or "").split())
    yield f"Usage: `{' '.join(['llmdistill', words, *map(usage, arguments), '[OPTIONS]'])}`"
    lines = ["| argument or option | meaning | default |", "|---|---|---|"]
    for p in command.params:
        name = p.name.upper() if p in arguments else ", ".join(p.opts)
        has_default = not (p.default is None or p.default is False or callable(p.default))
        default = f"`{p.default}`" if has_default else ""
        lines.append(
            f"| `{name}` | {cell(p.help or '')} | {'required' if p.required else default} |"
        )
    yield "\n".join(lines)


def usage(argument: Any) -> str:
    """NAME for one value, NAME ... for several, in brackets if it can be left out."""
    name = argument.name.upper() + (" ..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


PAGES = {"recipe.md": recipe_page, "commands.md": commands_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        print(f"wrote docs/reference/{name}")
