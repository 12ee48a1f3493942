"""The documents are true: examples run, and the tests, files and calls that they name exist."""

from __future__ import annotations

import ast
import functools
import itertools
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import llmdistill
from llmdistill.evaluation.measure import MEANING
from llmdistill.generate import generate
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import ResponseObjective
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Writer
from scripts import write_reference
from tests import toy
from tests.support.recipes import build_generation
from tests.support.servers import chat, last, scripted
from tests.support.spies import spy
from tests.training.helpers import arguments, gradient, weights
from tests.training.helpers import trainer as make_trainer

ROOT = Path(__file__).parents[1]

# ---- the examples of docs/extending.md ----

MOST_LINES = 15


def sections() -> dict[str, list[str]]:
    """The Python blocks of docs/extending.md under the heading that they belong to."""
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^```python\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


SHARED, *EXAMPLES, OWN_GENERATOR = [title for title, blocks in sections().items() if blocks]


def run(blocks: list[str], folder: Path) -> dict[str, Any]:
    """What the blocks define, executed one after the other with the names that the page promises."""
    names: dict[str, Any] = {
        "student": toy.model(),
        "teacher_model": toy.teacher_model(),
        "tokenizer": toy.tokenizer(),
        "rows": toy.rows(8),
        "training_arguments": arguments(folder, learning_rate=1.0),
    }
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec"), names)
    return names


def step(blocks: list[str], folder: Path) -> tuple[torch.Tensor, Any]:
    """The student's gradient in one step of the trainer that the blocks make, and that trainer."""
    trainer = run(blocks, folder)["trainer"]
    trainer.written = spy(trainer.rollout, "write")
    before = weights(trainer.model.student)
    trainer.train()
    return before - weights(trainer.model.student), trainer


def both_kls(found, trainer, folder):
    forward, reverse = (
        gradient(folder, objectives=[ResponseObjective(name)])
        for name in ("forward_kl", "reverse_kl")
    )
    torch.testing.assert_close(found, 0.2 * forward + 0.8 * reverse)


def weighs_each_token(found, trainer, folder):
    def by_loops(sequences):
        lengths = sequences.num_predicted.tolist()
        return torch.tensor([min(place / 5, 1.0) for n in lengths for place in range(1, n + 1)])

    expected = gradient(folder, objectives=[ResponseObjective(token_weight=by_loops)])
    torch.testing.assert_close(found, expected)


def matches_the_last_layer(found, trainer, folder):
    def mean_gap(mine_NH, other_NH):
        return (mine_NH - other_NH).abs().mean(-1)

    objectives = [ResponseObjective(), HiddenObjective(mean_gap, weight=0.5)]
    torch.testing.assert_close(found, gradient(folder, objectives=objectives))
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(logs["forward_kl"] + 0.5 * logs["last_layer"], rel=1e-5)


def writes_four_tokens(found, trainer, folder):
    rollout = SampledRollout("student", max_new_tokens=4)
    torch.testing.assert_close(found, gradient(folder, rollout=rollout))
    assert trainer.written[0].num_predicted.max() == 4


def halves_the_temperature(found, trainer, folder):
    def sharp(student_nV, teacher_nV):
        return 2 * teacher_nV

    expected = gradient(folder, objectives=[ResponseObjective(target=sharp)])
    torch.testing.assert_close(found, expected)


def keeps_what_is_near_the_top(found, trainer, folder):
    """Of the student's tokens alone: by a forward pass of the teacher, without the rollout's."""
    sequences = trainer.written[0]
    with torch.no_grad():
        logits_BTV = trainer.teacher.model(
            input_ids=sequences.input_ids_BT, attention_mask=sequences.attention_mask_BT
        ).logits[..., : toy.NUM_TOKENS]
    logits_NV = logits_BTV[sequences.predictor_mask_BT]
    below_N = logits_NV.amax(-1) - logits_NV.gather(-1, sequences.targets_N[:, None])[:, 0]
    by_student_N = sequences.target_writers_N == Writer.STUDENT
    assert below_N[by_student_N].max() <= 4.0 + 1e-3
    assert below_N[by_student_N].max() > 2.0  # a narrower rule would have kept less
    assert 0 < trainer.state.log_history[0]["acceptance"] < 1


def weighs_two(found, trainer, folder):
    torch.testing.assert_close(found, 2 * gradient(folder))
    assert trainer.state.log_history[0]["weight_forward_kl"] == 2.0


CHECKS = {
    "A divergence with an option": both_kls,
    "A token weight": weighs_each_token,
    "An objective on hidden states, with a projector": matches_the_last_layer,
    "A rollout": writes_four_tokens,
    "A teacher": halves_the_temperature,
    "An acceptance rule": keeps_what_is_near_the_top,
    "A weight that changes": weighs_two,
}


def test_every_example_is_checked():
    assert SHARED == "What the examples share"
    assert list(CHECKS) == EXAMPLES


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_takes_part_in_training(title, tmp_path):
    """Its gradient is that of a second computation, and not that of the run without it."""
    shared = sections()[SHARED]
    plain, _ = step(shared, tmp_path)
    found, trainer = step([*shared, *sections()[title]], tmp_path)
    assert (found - plain).norm() > 1e-2 * plain.norm()
    CHECKS[title](found, trainer, tmp_path)


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_error_in_an_example_is_seen(title, tmp_path):
    """A block that raises when it is used, and one whose extension is left out."""
    shared, (extension, use) = sections()[SHARED], sections()[title]
    last = extension.rstrip().splitlines()[-1]
    broken = extension.replace(last, re.sub(r"return .*", "raise ZeroDivisionError", last))
    assert broken != extension
    with pytest.raises(ZeroDivisionError):
        step([*shared, broken, use], tmp_path)
    with pytest.raises(NameError):
        step([*shared, use], tmp_path)


@pytest.mark.parametrize("title", [SHARED, *EXAMPLES, OWN_GENERATOR])
def test_an_example_is_short(title):
    assert all(len(block.splitlines()) <= MOST_LINES for block in sections()[title])
    assert len(sections()[title]) == (2 if title in EXAMPLES else 1)


@pytest.mark.slow
def test_the_own_generator_and_filter_make_a_dataset(tmp_path, monkeypatch):
    """The recipe of the page, with a server that answers in place of its teacher."""
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "riddles.py").write_text(sections()[OWN_GENERATOR][0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def answer(body, number):
        asked = last(body)
        if not asked.startswith("Write"):
            return chat("It is the one!")
        animal = asked.split(": ")[1]
        return chat(f"Which {animal} is it? " + "Say! " * (100 if animal == "eel" else number))

    with scripted(answer) as server:
        teacher = {"kind": "remote", "model": "m", "url": server.url}
        given = yaml.safe_load(block) | {"teacher": teacher, "target": 6, "round_size": 9}
        made = generate(build_generation(given))
    assert made.counts.variants == {"cat": 3, "owl": 3}
    assert made.counts.dropped == {"riddle too long": 2}


# ---- docs/invariants.md ----

CODE = r"\b[NRSDP]\d{1,2}\b"


def docstrings(tree: ast.Module) -> dict[str, str]:
    """The docstring of a file under "", and those of its functions and classes by their names."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = {
        node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, kinds)
    }
    return {"": ast.get_docstring(tree) or "", **found}


@functools.cache
def cited() -> dict[str, dict[str, str]]:
    """The docstrings of every file of tests, by its path from the root."""
    return {
        path.relative_to(ROOT).as_posix(): docstrings(ast.parse(path.read_text(encoding="utf-8")))
        for path in (ROOT / "tests").rglob("*.py")
    }


def invariants() -> dict[str, list[tuple[str, str]]]:
    """The tests, as (path, name), that docs/invariants.md names for each code."""
    text = (ROOT / "docs/invariants.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z]\d+) \|.*\| (.*) \|$", text, flags=re.MULTILINE)
    assert len(dict(rows)) == len(rows), "a code has two rows"
    return {code: named_tests(tests) for code, tests in rows}


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/\S+?\.py)::(\w+)`", text)


def test_every_code_in_the_tests_is_explained_and_every_code_has_a_test():
    texts = itertools.chain.from_iterable(file.values() for file in cited().values())
    assert set(re.findall(CODE, " ".join(texts))) == set(invariants())
    assert all(invariants().values())


@pytest.mark.parametrize("code", invariants())
def test_the_tests_of_a_code_exist_and_name_it(code):
    files = cited()
    for path, name in invariants()[code]:
        assert name in files[path], f"{path} has no {name}"
        assert re.search(rf"\b{code}\b", files[path][""] + files[path][name]), f"{name}: {code}"


# ---- names in the documents ----


DEVELOPERS = ["CONTRIBUTING", *(f"docs/{n}" for n in ("architecture", "extending", "invariants", "upgrading", "correctness"))]  # fmt: skip


@pytest.mark.parametrize("path", [ROOT / f"{name}.md" for name in DEVELOPERS], ids=DEVELOPERS)
def test_files_and_tests_that_a_document_names_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+/[\w/]*(?:\.(?:py|md|toml))?)`", text):
        found = (ROOT / name).exists() or (ROOT / "llmdistill" / name).exists()
        assert found, f"{path.name}: {name}"
    for file, name in named_tests(text):
        assert name in cited()[file], f"{path.name}: {file}::{name}"


def trace() -> list[tuple[str, str]]:
    """(file, name) of each call that docs/architecture.md lists."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^([a-z_/]+\.py) +([\w.]+)", text, flags=re.MULTILINE)


@pytest.mark.slow
def test_a_batch_makes_the_calls_of_the_trace_in_their_order(tmp_path):
    """An on-policy step with a checkpoint and an export; `distill` itself is the line before."""
    (first, *expected), package = trace(), Path(llmdistill.__file__).parent
    assert first == ("run.py", "distill")
    made = make_trainer(
        tmp_path, rollout=SampledRollout("student", max_new_tokens=4), max_grad_norm=1.0,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    calls = []

    def record(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            calls.append((path.relative_to(package).as_posix(), frame.f_code.co_qualname))

    sys.setprofile(record)
    try:
        made.train()
        made.export_student(tmp_path / "student")
    finally:
        sys.setprofile(None)
    following = iter(calls)
    missing = [call for call in expected if call not in following]
    assert len(expected) > 25
    assert missing == []


def test_the_layers_are_those_of_pyproject():

    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = contract["tool"]["importlinter"]["contracts"][0]["layers"]
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```\n(cli >.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    found = [layer.split() for layer in shown.split(">")]
    assert found == [layer.replace("llmdistill.", "").split() for layer in layers]


def test_the_architecture_is_short():
    assert (ROOT / "docs/architecture.md").read_text(encoding="utf-8").count("\n") <= 150


# ---- pages that are generated, and what a page may be ----


@pytest.mark.parametrize("name", write_reference.PAGES)
def test_the_reference_is_what_the_code_says(name):
    """If this fails, run `python scripts/write_reference.py`."""
    committed = (ROOT / "docs/reference" / name).read_text(encoding="utf-8")
    assert committed == write_reference.PAGES[name]()


def test_every_key_of_a_recipe_is_in_the_reference():
    """Found without the script: by the fields of every section class."""
    text = (ROOT / "docs/reference/recipe.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    sections = [cls for cls in write_reference.classes().values() if "kind" in cls.model_fields]
    fields = {name for cls in sections for name in cls.model_fields}
    assert len(fields) > 40
    assert fields - described == {"kind"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    """mkdocs checks the pages in docs/; these are the others."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_readme_is_short():
    """A first page: the manual is in docs/."""
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 120


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(entries(menu)) == sorted(pages)


def entries(menu: Any) -> list[str]:
    """The pages of a menu and of the menus in it."""
    if isinstance(menu, str):
        return [menu]
    parts = menu.values() if isinstance(menu, dict) else menu
    return [page for part in parts for page in entries(part)]


def test_errors_in_the_troubleshooting_page_exist():
    """What is quoted as a symptom is part of a message of the package."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    symptoms = re.findall(r"^\| ([^|]*) \|", page, flags=re.MULTILINE)
    quoted = [text for symptom in symptoms for text in re.findall(r"`([^`]+)`", symptom)]
    pieces = [piece.strip() for text in quoted for piece in text.split("...") if piece.strip()]
    nodes = [
        node
        for path in (ROOT / "llmdistill").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    names = {"acceptance", "by: teacher", "block_size: auto"}
    known = " ".join(texts) + "unknown key 'objectives[0].temprature'. Did you mean 'temperature'?"
    assert len(pieces) > 8
    assert [piece for piece in pieces if piece not in known and piece not in names] == []


def test_each_figure_is_explained():
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert [name for name in MEANING if f"`{name}`" not in page] == []


def test_every_public_name_is_in_the_reference_of_python():
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    documented = {
        line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    }
    assert set(llmdistill.__all__) - {"LlmDistillError"} <= documented  # the errors are one module
