"""The package as a whole: public names, safety of its source, size limits, effects of importing
it.
"""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import llmdistill
from llmdistill import errors

PACKAGE = Path(llmdistill.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_the_public_names():
    """P3: at most 15, each importable."""
    assert llmdistill.__all__ == [
        "CrossEntropyObjective", "DistillTrainer", "FixedRollout", "HiddenObjective", "InterleavedRollout",
        "LlmDistillError", "LocalTeacher", "MixedRollout", "ResponseObjective", "SampledRollout", "Sampling", "distill",
    ]  # fmt: skip
    for name in llmdistill.__all__:
        assert getattr(llmdistill, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = llmdistill.nothing


SIGNATURES = {
    "DistillTrainer": "student teacher rollout objectives args train_dataset eval_dataset processing_class "
    "callbacks optimizers model_card merge_adapter",
    "LocalTeacher": "model tokenizer",
    "ResponseObjective": "divergence target token_weight weight scale_by_t2 chunk_size options",
    "SampledRollout": "by sampling max_new_tokens samples",
    "InterleavedRollout": "top_k accept block_size max_new_tokens student_sampling teacher_sampling",
    "MixedRollout": "student other share",
    "Sampling": "temperature top_p top_k continuous",
    "distill": "recipe resume overwrite",
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
