"""The package as a whole: public names, safety of its source, size limits, effects of importing
it.
"""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import Trainer

import llmdistill
from llmdistill import errors
from llmdistill.training.trainer import DistillTrainer

PACKAGE = Path(llmdistill.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = Path(__file__).parent
UPGRADING = (TESTS.parent / "docs" / "upgrading.md").read_text(encoding="utf-8")


def test_the_public_names():
    """P3: at most 15, each importable."""
    assert llmdistill.__all__ == [
        "CrossEntropyObjective", "DistillTrainer", "FixedRollout", "HiddenObjective", "InterleavedRollout",
        "LlmDistillError", "LocalTeacher", "MixedRollout", "ResponseObjective", "SampledRollout", "Sampling", "distill",
        "load_model", "load_recipe", "push",
    ]  # fmt: skip
    for name in llmdistill.__all__:
        assert getattr(llmdistill, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = llmdistill.nothing


SIGNATURES = {
    "DistillTrainer": "student teacher rollout objectives args train_dataset eval_dataset processing_class "
    "callbacks optimizers model_card merge_adapter export_dtype measured_against responses_folder",
    "LocalTeacher": "model tokenizer",
    "ResponseObjective": "divergence target token_weight weight divisor scale_by_t2 chunk_size options",
    "SampledRollout": "by sampling max_new_tokens samples batch_size",
    "InterleavedRollout": "top_k accept block_size max_new_tokens student_sampling teacher_sampling batch_size",
    "MixedRollout": "student other share",
    "Sampling": "temperature top_p top_k continuous",
    "distill": "recipe resume overwrite show_progress",
    "load_model": "name revision dtype device quantization placement attn_implementation sees_images",
    "load_recipe": "path overrides",
    "push": "folder name private revision create_pr message token",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_public_signatures(name):
    """P3."""
    assert list(inspect.signature(getattr(llmdistill, name)).parameters) == SIGNATURES[name].split()


def calls(tree: ast.AST):
    """(dotted name, keywords) of every call in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_executed_that_was_read(path):
    """S3: no pickle, no eval, no unsafe YAML; code of a model's repository is off wherever it is
    named.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, keywords in calls(tree):
        assert name not in {
            "eval",
            "exec",
            "yaml.load",
            "torch.load",
            "pickle.load",
            "pickle.loads",
        }, name
        # An adapter is weights and numbers: PEFT takes no such argument and runs no code of its.
        if name.endswith(".from_pretrained") and name != "PeftModel.from_pretrained":
            assert keywords.get("trust_remote_code") == "False", f"{name} leaves it to chance"
    imported = {
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    }
    assert not imported & {"pickle", "marshal", "shelve", "dill"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_functions_and_classes_stay_small(path):
    """P5."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            limit = 200 if isinstance(node, ast.ClassDef) else 50
            size = node.end_lineno - node.lineno + 1
            assert size <= limit, f"{node.name}: {size} lines"


SUFFIX = re.compile(r"[a-z]\w*_([A-Z][A-Z0-9]{0,4})")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_shape_suffix_is_in_the_legend_of_its_file(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [n for node in ast.walk(tree) for n in _names(node)]
    found = [match[1] for name in names if (match := SUFFIX.fullmatch(name))]
    used = {letter for suffix in found for letter in suffix if letter.isalpha()}
    legend = ast.get_docstring(tree) or ""
    assert {
        one for one in used if not re.search(rf"\b{one}(, [A-Z])*( and [A-Z])? = ", legend)
    } == set()


def _names(node: ast.AST) -> list[str]:
    return [
        getattr(node, field)
        for field in ("id", "arg", "attr")
        if isinstance(getattr(node, field, None), str)
    ]


def test_only_the_trainer_imports_trainer():
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module == "transformers"
        and any(alias.name == "Trainer" for alias in node.names)
    ]
    assert users == ["training/saving.py"]


def test_importing_the_package_imports_nothing_heavy():
    """P5."""
    code = "import sys, llmdistill.recipe; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_errors_have_two_bases_and_survive_pickling():
    kinds = [
        e for e in vars(errors).values() if isinstance(e, type) and e is not errors.LlmDistillError
    ]
    for kind in kinds:
        assert issubclass(kind, errors.LlmDistillError)
        assert issubclass(kind, ValueError | RuntimeError)
        copy = pickle.loads(pickle.dumps(kind("what, where, got, do")))
        assert (type(copy), str(copy)) == (kind, "what, where, got, do")


# ---- docs/upgrading.md ----


def overrides() -> dict[str, list[str]]:
    """The table of overrides: method -> (reason, test, function of Trainer)."""
    table = UPGRADING.split("## Overrides of Trainer")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip(" `") for cell in row[1:]] for row in rows}


def test_every_override_of_trainer_is_in_the_table():
    kinds = DistillTrainer.__mro__
    ours = {name for kind in kinds[: kinds.index(Trainer)] for name in vars(kind)}
    methods = {name for name in ours if not name.startswith("__")} | {"__init__"}
    assert set(overrides()) == {name for name in methods if hasattr(Trainer, name)}


def test_what_the_table_of_overrides_names_exists():
    tests = {
        node.name
        for folder in ("training", "faults", "distributed")
        for file in (TESTS / folder).glob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for method, (_, test, function) in overrides().items():
        assert test in tests, method
        assert hasattr(Trainer, function), method


def test_every_private_name_of_torch_is_on_that_page():
    used = {
        ast.unparse(node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_")
    }
    private = {name for name in used if name.startswith("torch.")}
    assert len(private) > 3
    assert not {name for name in private if f"`{name}`" not in UPGRADING}


def test_its_types_are_for_others_too():
    """PEP 561: without this file type checkers ignore our annotations."""
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_the_same_everywhere():
    root = PACKAGE.parent
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == llmdistill.__version__
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.+?)\]", changes, flags=re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == llmdistill.__version__
