"""Names and default values, read from source files that a recipe must not import.

Importing torch takes seconds.  Reading a source file with `ast` takes milliseconds.  This way each
default is written once, in the signature that uses it, and each list of names is the table itself.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.facts import close_to

PACKAGE = Path(__file__).parents[1]


class Parameter(NamedTuple):
    """A keyword parameter: its annotation as text, and its default or REQUIRED."""

    annotation: str
    default: Any


REQUIRED = object()  # None cannot mark a missing default: many defaults are None
Bounds = Mapping[tuple[str, str], tuple[float | None, float | None]]


class Table(NamedTuple):
    """A dict literal of this package, by file and name.  Its entries are functions or classes.

    A dict BOUNDS in the same file can limit numeric options: it maps (entry, option) to (lowest,
    highest), with None for no bound.
    """

    path: str
    name: str

    @property
    def entries(self) -> tuple[str, ...]:
        return names(self.path, self.name)

    def options(self, entry: str) -> Mapping[str, Parameter]:
        return options(self.path, self.name, entry)

    @property
    def bounds(self) -> Bounds:
        return constant(self.path, "BOUNDS") or {}


class _Names(NamedTuple):
    """Lists the names in the JSON schema, when that is asked for."""

    table: Table
    others: tuple[str, ...]

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return handler(schema) | {"enum": [*self.others, *self.table.entries]}


def one_of(table: Table, *others: str) -> Any:
    """Return the type of a field that names an entry of a table, or one of `others`."""

    # The table is read when a recipe is checked, and not when this package is imported.
    def check(name: str) -> str:
        known = (*others, *table.entries)
        if name not in known:
            raise PydanticCustomError(
                "entry",
                "should be one of {names}.{close}",
                {"names": ", ".join(known), "close": close_to(name, known)},
            )
        return name

    return Annotated[str, AfterValidator(check), _Names(table, others)]


@functools.cache
def names(path: str, table: str) -> tuple[str, ...]:
    """Return the keys of a dict literal: names('objectives/divergences.py', 'DIVERGENCES')."""
    return tuple(_table(path, table))


@functools.cache
def options(path: str, table: str, entry: str) -> Mapping[str, Parameter]:
    """Return the keyword parameters of the function or class that an entry of a table names."""
    return parameters(path, ast.unparse(_table(path, table)[entry]))


@functools.cache
def parameters(path: str, name: str) -> Mapping[str, Parameter]:
    """Return the keyword parameters of a function or an `__init__`, or the fields of a dataclass.

    Parameters of base classes in the same file are included.
    """
    node = _definition(path, name)
    found: dict[str, Parameter] = {}
    if isinstance(node, ast.FunctionDef):
        return MappingProxyType(_keywords(path, node))
    for base in node.bases:
        if isinstance(base, ast.Name) and _definition(path, base.id, missing=True) is not None:
            found |= parameters(path, base.id)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return MappingProxyType(found | _keywords(path, item))
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if not annotation.startswith("ClassVar"):
                found[item.target.id] = Parameter(annotation, _default(path, item.value))
    return MappingProxyType(found)


@functools.cache
def defaults(path: str, name: str) -> SimpleNamespace:
    """Return the defaults of `parameters` by name.

    For example `defaults('rollouts/replay.py', 'ReplayRollout').capacity`.  A default that is made
    by a call, such as `Sampling(temperature=0.7)`, becomes the dict of its keyword arguments.
    """
    found = parameters(path, name)
    return SimpleNamespace(
        **{name: p.default for name, p in found.items() if p.default is not REQUIRED}
    )


@functools.cache
def constant(path: str, name: str) -> Any:
    """Return the value of a literal that a module assigns, or None if it does not assign `name`."""
    found = _assigned(path).get(name)
    return None if found is None else _value(path, found)


@functools.cache
def needs(path: str, name: str) -> frozenset[str]:
    """Return the kinds of `Need` that a class lists in `provides`: {'distribution', 'hidden'}."""
    for item in _definition(path, name).body:
        if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "provides":
            named = (node for node in ast.walk(item.value) if isinstance(node, ast.Attribute))
            return frozenset(
                node.attr.lower() for node in named if ast.unparse(node.value) == "Need"
            )
    return frozenset()


@functools.cache
def _tree(path: str) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


@functools.cache
def _assigned(path: str) -> dict[str, ast.expr]:
    """Return the expression that each name of a module is assigned to."""
    found: dict[str, ast.expr] = {}
    for node in _tree(path).body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            found[ast.unparse(node.target)] = node.value
        elif isinstance(node, ast.Assign):
            found |= {ast.unparse(target): node.value for target in node.targets}
    return found


def _table(path: str, table: str) -> dict[str, ast.expr]:
    literal = _assigned(path)[table]
    assert isinstance(literal, ast.Dict), f"{table} in {path} is not a dict literal"
    entries = zip(literal.keys, literal.values, strict=True)
    return {ast.literal_eval(key): value for key, value in entries if key is not None}


def _definition(path: str, name: str, *, missing: bool = False) -> Any:
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = (n for n in _tree(path).body if isinstance(n, kinds) and n.name == name)
    node = next(found, None)
    assert node is not None or missing, f"{path} defines no {name}"
    return node


def _keywords(path: str, function: ast.FunctionDef) -> dict[str, Parameter]:
    """Return keyword-only parameters, and positional ones that have a default."""
    arguments = function.args
    # `ast` aligns defaults with the last positional arguments.
    positional = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    pairs = [
        *zip(positional, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return {
        argument.arg: Parameter(
            ast.unparse(argument.annotation) if argument.annotation else "",
            _default(path, value),
        )
        for argument, value in pairs
    }


FACTORIES: dict[str, Callable[[], Any]] = {"dict": dict, "list": list}


def _default(path: str, node: ast.expr | None) -> Any:
    if node is None:
        return REQUIRED
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":  # of a dataclass
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "default_factory" in given:
            return FACTORIES[ast.unparse(given["default_factory"])]()
        return _default(path, given.get("default"))
    return _value(path, node)


def _value(path: str, node: ast.expr) -> Any:
    """Evaluate a literal, a name that is assigned to one, or the keywords of a call.

    A name can be assigned in this module, or in a module of this package that it imports from.
    """
    if isinstance(node, ast.Name):
        if node.id in _assigned(path):
            return _value(path, _assigned(path)[node.id])
        source = _imported_from(path, node.id)
        assert node.id in _assigned(source), f"{source} assigns no {node.id}"
        return constant(source, node.id)
    if isinstance(node, ast.Call):
        return {k.arg: _value(path, k.value) for k in node.keywords if k.arg is not None}
    return ast.literal_eval(node)


def _imported_from(path: str, name: str) -> str:
    """Return the file of this package that a module imports a name from."""
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            assert node.module is not None
            return node.module.removeprefix("llmdistill.").replace(".", "/") + ".py"
    raise AssertionError(f"{path} neither assigns nor imports {name}")
