"""What a recipe reads from source files: names, options, parameters, defaults, constants."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from llmdistill.objectives.divergences import DIVERGENCES
from llmdistill.recipe import tables
from llmdistill.recipe.tables import (
    REQUIRED,
    Parameter,
    Table,
    constant,
    defaults,
    names,
    one_of,
    options,
)

MODELS = '''
"""Base models of numbers."""

from typing import ClassVar

from dataclasses import dataclass
from llmdistill.shop.sizes import LARGE, NESTED
from elsewhere import Stranger

SMALL = 3
WORDS: tuple[str, ...] = ("a", "b")
REDUCED = ["x", 1.5, None]


def plain(first, second, third=SMALL, *, fourth: int, fifth: str = "five", sixth=LARGE): ...


class Base:
    def __init__(self, *, size: int = 1, colour: str = "red") -> None: ...


class Derived(Base):
    def __init__(self, *, colour: str = "blue", shape: str = "round") -> None: ...


class Heir(Derived):
    """Neither fields nor an `__init__`."""


class Foreign(Stranger):
    def __init__(self, *, alone: bool = True) -> None: ...


@dataclass
class Fields:
    needed: int
    kind: ClassVar[str] = "fields"
    number: float = 0.5
    made: dict = Sampling(temperature=0.7, top_k=SMALL, deep=Inner(size=LARGE))


@dataclass
class MoreFields(Fields):
    number: float = 0.25
    extra: tuple = WORDS


def calls(length=unknown_name): ...


class Teacher:
    provides = frozenset({Need.DISTRIBUTION, Need.HIDDEN, Other.TEXT})


@dataclass
class Factories:
    entries: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)
    width: int = field(default=SMALL, repr=False)
    name: str = field(repr=False)


BOUNDS = {("one", "third"): (0, None)}
TABLE = {"one": plain, "two": Derived, "three": Fields}
SIZES: dict[str, int] = {"s": 1, "l": LARGE}
SPREAD = {"zero": plain, **TABLE}
CHOSEN = NESTED
NOT_A_TABLE = [plain, Derived]
'''
SIZES = '''
LARGE: int = 40
NESTED = {"rows": (1, 2)}
'''  # fmt: skip
CACHED = ("names", "options", "parameters", "defaults", "constant", "needs", "_tree", "_assigned")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A package with one module that imports from another."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "models.py").write_text(MODELS)
    (tmp_path / "shop" / "sizes.py").write_text(SIZES)
    monkeypatch.setattr(tables, "PACKAGE", tmp_path)
    yield "shop/models.py"
    for name in CACHED:  # nothing of this package is left for other tests
        getattr(tables, name).cache_clear()


def test_every_cached_function_is_forgotten_by_the_fixture():
    cached = {name for name, value in vars(tables).items() if hasattr(value, "cache_clear")}
    assert cached == set(CACHED)


def test_names_are_the_keys_in_order(shop):
    assert names(shop, "TABLE") == ("one", "two", "three")
    assert names(shop, "SIZES") == ("s", "l")  # with an annotation
    assert names(shop, "SPREAD") == ("zero",)  # what is spread into it is not followed


def test_names_of_the_package_are_those_of_its_table():
    assert names("objectives/divergences.py", "DIVERGENCES") == tuple(DIVERGENCES)


def test_parameters_are_those_that_have_a_default_or_need_a_keyword(shop):
    assert tables.parameters(shop, "plain") == {
        "third": Parameter("", 3),
        "fourth": Parameter("int", REQUIRED),
        "fifth": Parameter("str", "five"),
        "sixth": Parameter("", 40),
    }


def test_options_are_the_parameters_of_an_entry(shop):
    assert options(shop, "TABLE", "one") is tables.parameters(shop, "plain")
    assert set(options(shop, "TABLE", "two")) == {"size", "colour", "shape"}


def test_a_class_has_the_parameters_of_its_bases_and_the_last_word(shop):
    derived = tables.parameters(shop, "Derived")
    assert {name: one.default for name, one in derived.items()} == {
        "size": 1, "colour": "blue", "shape": "round",
    }  # fmt: skip
    assert tables.parameters(shop, "Heir") == derived
    assert set(tables.parameters(shop, "Foreign")) == {"alone"}  # a base of another file


def test_fields_of_a_dataclass_are_parameters_and_class_variables_are_not(shop):
    fields = tables.parameters(shop, "Fields")
    assert set(fields) == {"needed", "number", "made"}
    assert fields["needed"] == Parameter("int", REQUIRED)
    more = tables.parameters(shop, "MoreFields")
    assert list(more) == ["needed", "number", "made", "extra"]
    assert (more["number"].default, more["extra"].default) == (0.25, ("a", "b"))


def test_parameters_cannot_be_changed(shop):
    with pytest.raises(TypeError):
        tables.parameters(shop, "plain")["third"] = Parameter("", 4)


def test_defaults_leave_out_what_is_required(shop):
    found = defaults(shop, "plain")
    assert vars(found) == {"third": 3, "fifth": "five", "sixth": 40}
    with pytest.raises(AttributeError, match="fourth"):
        _ = found.fourth


def test_a_default_that_is_made_by_a_call_is_its_keywords(shop):
    expected = {"temperature": 0.7, "top_k": 3, "deep": {"size": 40}}
    assert defaults(shop, "Fields").made == expected


def test_constants_are_literals_here_or_in_the_module_that_they_come_from(shop):
    assert constant(shop, "SMALL") == 3
    assert constant(shop, "WORDS") == ("a", "b")
    assert constant(shop, "REDUCED") == ["x", 1.5, None]
    assert constant(shop, "CHOSEN") == {"rows": (1, 2)}
    assert constant("shop/sizes.py", "LARGE") == 40
    assert constant(shop, "NOWHERE") is None


def test_defaults_of_dataclass_fields_are_what_the_field_makes(shop):
    found = vars(defaults(shop, "Factories"))
    assert found == {"entries": {}, "lines": [], "width": 3}  # the name is required


def test_a_table_knows_its_entries_their_options_and_bounds(shop):
    table = Table(shop, "TABLE")
    assert table.entries == ("one", "two", "three")
    assert table.options("one") is options(shop, "TABLE", "one")
    assert table.bounds == {("one", "third"): (0, None)}
    assert Table("shop/sizes.py", "NESTED").bounds == {}


def test_a_field_that_names_an_entry_takes_no_other_name(shop):
    field = TypeAdapter(one_of(Table(shop, "TABLE"), "auto"))
    assert [field.validate_python(name) for name in ("three", "auto")] == ["three", "auto"]
    with pytest.raises(
        ValidationError, match=r"one of auto, one, two, three.*Did you mean 'three'"
    ):
        field.validate_python("thre")


def test_needs_are_those_that_a_class_provides(shop):
    assert tables.needs(shop, "Teacher") == {"distribution", "hidden"}
    assert tables.needs(shop, "Base") == frozenset()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda shop: tables.parameters(shop, "Nobody"), "shop/models.py defines no Nobody"),
        (lambda shop: names(shop, "NOT_A_TABLE"), "NOT_A_TABLE in shop/models.py is not a dict"),
        (lambda shop: defaults(shop, "calls"), "neither assigns nor imports unknown_name"),
        (lambda shop: names(shop, "NOWHERE"), "NOWHERE"),
        (lambda shop: options(shop, "TABLE", "four"), "four"),
        (lambda shop: tables.needs(shop, "Nobody"), "shop/models.py defines no Nobody"),
    ],
)
def test_a_name_that_is_missing_is_named(shop, read, message):
    with pytest.raises((AssertionError, KeyError), match=message):
        read(shop)


def test_a_file_that_is_missing_is_named(shop):
    with pytest.raises(FileNotFoundError, match="none.py"):
        names("shop/none.py", "TABLE")


def test_reading_imports_nothing_of_what_is_read():
    code = (
        "import sys; from llmdistill.recipe.tables import defaults; "
        "defaults('rollouts/sampled.py', 'SampledRollout'); "
        "print({'torch', 'llmdistill.rollouts'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
