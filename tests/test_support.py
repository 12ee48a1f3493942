"""What the tests share, and how they share it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.spies import spy

TESTS = Path(__file__).parent
SOURCES = sorted(TESTS.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Each module that a file imports, and each name that it takes from one, dotted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_from_a_test_module(path):
    """What two test modules need is in tests/support."""
    parts = {part for name in imported(path) for part in name.split(".")}
    assert not {part for part in parts if part.startswith("test_")}


def test_a_spy_calls_and_keeps_what_came_back():
    words = {"a": 1}

    class Book:
        def find(self, word, *, default=0):
            return words.get(word, default)

    book = Book()
    found = spy(book, "find")
    assert book.find("a") == 1
    assert book.find("b", default=7) == 7
    assert found == [1, 7]
    assert Book().find("b") == 0
    assert found == [1, 7]  # another object is not watched
