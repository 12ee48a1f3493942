"""A user's desk on toys: the files, folders and models that the README and the manual name.

A yaml block is checked as it is and then run with less of everything (`tests/support/recipes.py`):
toy models and rows, short responses, no filters and no patterns, because toys write no words.  A
remote teacher is checked only.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill import cli
from llmdistill import recipe as recipes
from llmdistill.evaluation import speculative
from llmdistill.generate import generate
from llmdistill.models import load
from llmdistill.recipe import GenerationRecipe
from llmdistill.run import distill
from tests import toy
from tests.support.files import write_jsonl
from tests.support.recipes import TRAINING, build_generation, generation_on_toys, on_toys

ROOT = Path(__file__).parents[2]
FILES = ("train", "heldout", "questions", "rows")
SHORT = ["--max-new-tokens", "8"]  # the last one counts
TRAINED: dict[str, Any] = {
    "output": "runs/block",
    "teacher": {"model": "org/teacher"},
    "student": {"model": "org/student"},
    "data": {"train": "train.jsonl", "eval": "heldout.jsonl"},
    "training": {},
}
GENERATED: dict[str, Any] = {
    "output": "data/block",
    "teacher": {"model": "org/teacher"},
    "generator": {"kind": "evolve"},
    "target": 2,
}


class Desk:
    """The working folder of one page.  Its blocks run one after the other and share it."""

    def __init__(self, folder: Path, pair: tuple[str, str]) -> None:
        self.folder, self.pair = folder, pair
        self.names: dict[str, Any] = {}
        for number, name in enumerate(FILES):
            rows = toy.rows(9 - number, seed=number)
            # A column that a teacher reads, and the student does not.
            write_jsonl(folder / f"{name}.jsonl", [row | {"solution": "blue"} for row in rows])
        for path in (*ROOT.glob("recipes/*.yaml"), *ROOT.glob("recipes/generate/*.yaml")):
            given = recipes.parse_yaml(path.read_text(encoding="utf-8"), path.name)
            self.save(given, path.relative_to(ROOT).as_posix())
        for run in ("quickstart", "a", "b"):
            student = folder / "runs" / run / "student"
            toy.model().save_pretrained(student)
            toy.tokenizer().save_pretrained(student)

    def save(self, given: dict[str, Any], name: str) -> None:
        """Save a recipe with toys in the place of its models."""
        if "generator" not in given:
            less = on_toys(given, self.pair, self.folder)
        elif given["teacher"].get("kind") == "remote":
            less = given  # only `--dry-run` can use it here
        else:
            less = generation_on_toys(given, self.pair, self.folder)
        less["output"] = given["output"]
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(yaml.safe_dump(less), encoding="utf-8")

    def run(self, language: str, text: str) -> None:
        """Run one block."""
        {"yaml": self.yaml, "python": self.python, "bash": self.bash}[language](text)

    def yaml(self, text: str) -> None:
        """A recipe, or sections of one; a first line `# name.yaml` saves it for later commands."""
        given = recipes.parse_yaml(text, "a block")
        if text.startswith("# ") and text.partition("\n")[0].endswith(".yaml"):
            recipes.build(given)
            self.save(given, text.partition("\n")[0].removeprefix("# "))
        elif given.keys() - recipes.Recipe.model_fields or "remote" in str(given.get("teacher")):
            self._generates(GENERATED | given)
        else:
            self._trains(TRAINED | given)

    def _trains(self, whole: dict[str, Any]) -> None:
        recipes.build(whole)
        less = on_toys(whole, self.pair, self.folder)
        less["training"] |= TRAINING
        if whole["data"].get("streaming"):
            less["training"] |= {"per_device_train_batch_size": 2}
        distill(recipes.build(less), overwrite=True, show_progress=False)

    def _generates(self, whole: dict[str, Any]) -> None:
        recipe: GenerationRecipe = build_generation(whole)
        if recipe.teacher.is_remote:
            return
        less = generation_on_toys(whole, self.pair, self.folder)
        less["generator"]["kind"] = recipe.generator.kind
        if recipe.generator.kind in ("alpaca", "self_instruct"):  # toys write no lists
            less["generator"] = {"kind": "evolve", "max_instruction_tokens": 120}
        less["output"] = f"{self.folder}/block/{recipe.generator.kind}"
        made = generate(build_generation(less | {"target": 2}), overwrite=True)
        assert made.counts.kept == 2

    def python(self, text: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'pin_memory' argument is set")  # torch's, on a CPU
            exec(compile(text, "a block", "exec"), self.names)

    def bash(self, text: str) -> None:
        """Commands of llmdistill; anything else belongs in a block that is marked as not run."""
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                assert words[0] == "llmdistill", f"mark the block, or remove the command: {line}"
                less = SHORT if words[1] == "evaluate" else []
                self._command([*words, *less])

    def _command(self, words: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as stop:
                cli.main()
        assert not stop.value.code, " ".join(words)
        if words[1:3] == ["recipes", "copy"]:  # what follows uses the copy, with less of everything
            name = words[4]
            text = (self.folder / name).read_text(encoding="utf-8")
            self.save(recipes.parse_yaml(text, name), name)


def stand_ins(monkeypatch: pytest.MonkeyPatch, folder: Path, pair: tuple[str, str]) -> None:
    """Let names of models that are not here mean toys; the embedded one keeps its shape."""
    found = load._locate
    embedded = folder / "embedded"
    toy.teacher_model(
        hidden=36, layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536
    ).save_pretrained(embedded)
    toy.tokenizer().save_pretrained(embedded)

    def locate(name: str) -> tuple[str, dict[str, Any]]:
        if name in load.EMBEDDED:
            return str(embedded), {}
        is_here = Path(name).exists() or name.endswith(".gguf")
        return found(name) if is_here else (pair[0], {})

    monkeypatch.setattr(load, "_locate", locate)
    monkeypatch.setattr(speculative, "ROWS", 2)
