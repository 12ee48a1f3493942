"""What the tests share, and how they share it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmdistill.models.load import native_bfloat16
from tests.support import machine
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


ANSWER = """
import sys
assert "torch" not in sys.modules  # a command that needs no torch starts as quickly as ever
import torch
from llmdistill.models.load import native_bfloat16
print(native_bfloat16(torch.device("cpu")))
"""


def answer_in_a_child(**variables) -> str:
    command = [sys.executable, "-c", ANSWER]
    environment = os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(("value", "native"), [("0", "False"), ("1", "True")])
def test_a_child_gives_the_forced_answer(value, native):
    path = machine.with_python_path(machine.FOLDER)
    assert answer_in_a_child(TEST_NATIVE_BFLOAT16=value, PYTHONPATH=path) == native


def test_this_process_and_its_children_give_the_same_answer():
    """Forced or not."""
    here = native_bfloat16(torch.device("cpu"))
    assert answer_in_a_child() == str(here)
    if machine.VARIABLE in os.environ:
        assert here is (os.environ[machine.VARIABLE] == "1")


def test_a_python_path_keeps_what_was_on_it(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    assert machine.with_python_path(Path("new")) == f"new{os.pathsep}before"
    monkeypatch.delenv("PYTHONPATH")
    assert machine.with_python_path(Path("new")) == "new"
