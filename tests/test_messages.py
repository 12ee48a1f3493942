"""What errors say: neutral words in the library, flags on the command line alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llmdistill
from llmdistill import cli
from llmdistill.errors import CheckpointError
from tests.support.commands import run

PACKAGE = Path(llmdistill.__file__).parent
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if PACKAGE / "cli" not in p.parents)
FLAG = re.compile(r"(?<![-\w])--[a-z]+(?:-[a-z]+)*(?![-\w])")
OF_OTHERS = {  # of pip, of llama.cpp and of cmake
    "models/embedded.py": {"--no-deps"},
    "publish/gguf.py": {"--outfile", "--outtype", "--build"},
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_names_no_flags(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    named = {flag for text in texts for flag in FLAG.findall(text)}
    name = path.relative_to(PACKAGE).as_posix()
    assert named <= OF_OTHERS.get(name, set())


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("x is not empty. Pass resume to go on, pass overwrite to replace it.", "x is not empty. Pass --resume to go on, pass --overwrite to replace it."),
        ("x has no run to resume. Start one without resume.", "x has no run to resume. Start one without --resume."),
        ("data/push/resume is damaged", "data/push/resume is damaged"),
        ("Run it (pass private=False, pass revision=dev).", "Run it (pass --public, pass --revision dev)."),
    ],
)  # fmt: skip
def test_the_command_line_says_flags(monkeypatch, capsys, message, shown):
    def fails():
        raise CheckpointError(message)

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"CheckpointError: {shown}\n"


@pytest.mark.parametrize(
    ("name", "wrong", "right", "said"),
    [
        ("magpie_cpu", "train", "generate", "this recipe generates a dataset. Use llmdistill generate."),
        ("gkd", "generate", "train", "this recipe trains a student. Use llmdistill train."),
        ("alpaca_to_student", "generate", "train", "this recipe trains a student. Use llmdistill train."),
    ],
)  # fmt: skip
def test_the_right_command_for_a_recipe_is_named(
    monkeypatch, capsys, tmp_path, name, wrong, right, said
):
    path = tmp_path / "mine.yaml"
    assert run(monkeypatch, "recipes", "copy", name, str(path)) == 0
    assert f"Run it with: llmdistill {right} {path}" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, wrong, str(path)) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_without_a_generator_is_told_that(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("output: x\nteacher: {model: m}\ntarget: 3\n")
    assert run(monkeypatch, "generate", str(tmp_path / "mine.yaml")) == 2
    assert "'generator' is missing" in capsys.readouterr().err
