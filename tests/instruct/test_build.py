"""Every section of a recipe that chooses a generator, a responder or a filter is built."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import get_args

import pytest

from llmdistill import recipe as recipes
from llmdistill.errors import RecipeError
from llmdistill.instruct import build, filters
from llmdistill.instruct.lion import Pools
from llmdistill.instruct.task_sources import read_tasks
from llmdistill.recipe.filters import FilterRecipe
from llmdistill.recipe.generation import GenerationTeacher
from llmdistill.recipe.generators import GeneratorRecipe, LionRecipe
from tests import toy

GENERATORS = get_args(get_args(GeneratorRecipe)[0])
FILTERS = get_args(get_args(FilterRecipe)[0])
TEACHERS = [get_args(one)[0] for one in get_args(get_args(GenerationTeacher)[0])]
# What a section cannot be without.
REQUIRED = {
    "student": "small", "pattern": r"\d+", "at_least": 2.0, "aspect": "quality", "model": "toy",
}  # fmt: skip
OWN = """
def riddles(number, kept):
    yield []


def short(task):
    return None
"""
SOURCES = ("prompts", "pool", "sources")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in toy.rows(20)))
    return str(path)


def section(chosen, rows):
    """A section with its defaults, as a recipe gives it."""
    given = {name: rows for name in SOURCES if name in chosen.model_fields}
    given |= {name: value for name, value in REQUIRED.items() if name in chosen.model_fields}
    if "function" in chosen.model_fields:
        own = Path(rows).with_name("own.py")
        own.write_text(OWN)
        given["function"] = f"{own}:{'riddles' if 'calls' in chosen.model_fields else 'short'}"
    return {"kind": chosen.model_fields["kind"].default, **given}


def recipe(rows, **changes):
    given = {
        "output": "set", "teacher": {"model": "m"}, "generator": {"kind": "magpie"}, "seed_tasks": rows, "target": 9,
        "filters": [],
    }  # fmt: skip
    return recipes.build_part(recipes.GenerationRecipe, given | changes, "recipe")


def split(chosen):
    tasks = read_tasks(chosen.pool)
    return Pools(tasks[:2], tasks[2:])


@pytest.mark.parametrize("chosen", GENERATORS, ids=lambda one: one.__name__)
def test_every_generator_is_built_with_its_defaults(chosen, rows):
    given = recipe(rows, generator=section(chosen, rows), seed=7)
    built = build.build_generator(given, read_tasks(given.seed_tasks), split)
    assert type(built).__name__ == named(chosen)
    if named(chosen) == "OwnGenerator":
        return
    for name, default in class_defaults(type(built)).items():
        expected = 7 if name == "seed" else default
        found = getattr(built, name, default)
        assert (tuple(found) if isinstance(found, list) else found) == expected, name


def class_defaults(chosen):
    """The defaults of a class and its bases, as Python itself sees them."""
    functions = [base.__init__ for base in chosen.__mro__ if "__init__" in vars(base)]
    found = [p for one in functions for p in inspect.signature(one).parameters.values()]
    return {p.name: p.default for p in found if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("chosen", FILTERS, ids=lambda one: one.__name__)
def test_every_filter_is_built(chosen, rows, monkeypatch):
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda name: name)
    given = recipe(rows, filters=[section(chosen, rows)], judge={"aspects": ["quality"]})
    (built,) = build.build_filters(given, [])
    assert type(built).__name__ == named(chosen)


def named(chosen):
    """The name of what a section builds."""
    return chosen.__name__.removesuffix("Recipe").replace("Python", "Own")


def test_options_of_a_recipe_reach_what_is_built(rows):
    answering = {"sampling": {"temperature": 0.5, "top_k": 3}, "max_new_tokens": 7, "hint": "Go."}
    options = {"sampling": {"top_p": 0.9}, "max_instruction_tokens": 5, "answering": answering}
    given = recipe(rows, generator={"kind": "magpie", **options})
    built = build.build_generator(given, [], split)
    assert (built.sampling.top_p, built.max_instruction_tokens) == (0.9, 5)
    how = built.answering
    assert (how.sampling.temperature, how.sampling.top_k, how.max_new_tokens, how.hint) == (
        0.5,
        3,
        7,
        "Go.",
    )
    given = recipe(
        rows, filters=[{"kind": "blacklist", "words": ["sea"]}, {"kind": "rouge", "at_most": 0.2}]
    )
    blacklist, rouge = build.build_filters(given, read_tasks(given.seed_tasks))
    assert blacklist.pattern.search("the Sea")
    assert (rouge.at_most, len(rouge.pool)) == (0.2, 20)


def test_lion_is_balanced_and_compared_with_its_pool(rows, tmp_path):
    lion = section(LionRecipe, rows)
    given = recipe(str(tmp_path / "none.jsonl"), generator=lion, filters=[{"kind": "rouge"}])
    rouge, balanced = build.build_filters(given, [])
    assert len(rouge.pool) == 20
    assert isinstance(balanced, filters.Balanced)
    assert balanced.at_most == 5  # half of nine, rounded up


@pytest.mark.parametrize("table", ["_GENERATORS", "_FILTERS", "_RESPONDERS"])
def test_a_section_that_is_in_no_table_fails_by_name(rows, monkeypatch, table):
    monkeypatch.setattr(build, table, {})
    given = recipe(rows, filters=[{"kind": "language"}])
    call, name = {
        "_GENERATORS": (lambda: build.build_generator(given, [], split), "MagpieRecipe"),
        "_FILTERS": (lambda: build.build_filters(given, []), "LanguageRecipe"),
        "_RESPONDERS": (lambda: build.build_responder(given), "LocalTeacherRecipe"),
    }[table]
    with pytest.raises(TypeError, match=f"{name} has no builder"):
        call()


def test_every_teacher_of_a_generation_has_a_builder():
    assert set(build._RESPONDERS) == set(TEACHERS)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("seeds", "seed_tasks", {"seeds": "x"}),
        ("columns", "format", {"columns": "alpaca"}),
        ("held_back", "test_share", {"held_back": 0.1}),
        *(
            (
                "generator.answer",
                "answering",
                {"generator": {"kind": one.model_fields["kind"].default, "answer": {}}},
            )
            for one in GENERATORS
            if "answering" in one.model_fields
        ),
        ("generator.by", "compare_by", {"generator": {"kind": "lion", "by": "referee"}}),
    ],
)
def test_a_key_that_was_renamed_says_its_new_name(rows, old, new, changes):
    with pytest.raises(RecipeError) as error:
        recipe(rows, **changes)
    assert f"unknown key '{old}'. It is now called '{new}'." in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "alpacca"}, "Did you mean 'alpaca'?"),
        (
            {
                "generator": {
                    "kind": "answer",
                    "prompts": "x",
                    "samples": 2,
                    "best_by": "likelyhood",
                }
            },
            "'generator.best_by' should be one of likelihood, consensus, reference, judge, got 'likelyhood'. Did you mean 'likelihood'?",
        ),
    ],
)
def test_a_name_must_be_one_of_the_table(rows, changes, said):
    with pytest.raises(RecipeError) as error:
        recipe(rows, **changes)
    assert said in str(error.value)


def test_a_resumed_run_may_reach_its_server_in_another_way(rows):
    remote = {"kind": "remote", "model": "m", "url": "http://one:1/v1"}
    first = recipe(rows, teacher=remote, generator={"kind": "evolve"})
    changes = {"target": 99, "format": "alpaca", "test_share": 0.5, "output": "moved"}
    other = remote | {"url": "http://two:2/v1", "timeout": 9.0, "key_from": "KEY"}
    assert (
        recipe(rows, **{"teacher": other, "generator": {"kind": "evolve"}} | changes).unchanging()
        == first.unchanging()
    )
    for part in ({"teacher": remote | {"model": "n"}}, {"seed": 1}):
        changed = recipe(rows, **{"teacher": remote, "generator": {"kind": "evolve"}} | part)
        assert changed.unchanging() != first.unchanging()


@pytest.mark.parametrize(
    ("generator", "may"),
    [
        ({"kind": "magpie"}, True),
        ({"kind": "self_instruct"}, False),  # it shows the teacher rows that were kept
        ({"kind": "self_instruct", "machine_examples": 0}, True),
    ],
)
def test_what_only_decides_which_rows_are_kept_may_change(rows, generator, may):
    first = recipe(rows, generator=generator)
    filters = {"filters": [{"kind": "language"}]}
    for part in (filters, {"round_size": 9}):
        changed = recipe(rows, generator=generator, **part)
        assert (changed.unchanging() == first.unchanging()) is may
    batches = recipe(rows, generator=generator, batch_size=8)
    assert batches.unchanging() == first.unchanging()


@pytest.mark.parametrize(
    ("generator", "expected"),
    [
        ({"kind": "magpie"}, []),
        ({"kind": "evolve"}, ["seeds"]),
        ({"kind": "answer", "prompts": "mine"}, ["mine"]),
        ({"kind": "lion", "student": "s", "pool": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_a_recipe_knows_what_its_teacher_is_shown_or_asked(generator, expected):
    assert [one.source for one in recipe("seeds", generator=generator).sources] == expected
