"""Recipes accept exactly the entries of the tables, and every section has its builder."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any, get_args

import pytest
from pydantic import AfterValidator, BaseModel

from llmdistill import recipe as recipes
from llmdistill.data.formats import FORMATS, to_examples
from llmdistill.errors import RecipeError
from llmdistill.evaluation.measure import MEANING, Figures
from llmdistill.models.quantization import QUANTIZATIONS
from llmdistill.objectives import build as objective_builders
from llmdistill.recipe import tables
from llmdistill.recipe.schedules import Share, Weight
from llmdistill.rollouts import build as rollout_builders
from llmdistill.schedules import SCHEDULES
from llmdistill.teachers import build as teacher_builders
from tests.conformance import entries


def members(union: Any) -> set[type]:
    """Return the classes of an annotated union of recipe sections."""
    if isinstance(union, type):
        return {union} if issubclass(union, BaseModel) else set()
    return {found for part in get_args(union) for found in members(part)}


def kinds(union: Any) -> set[str]:
    return {section.model_fields["kind"].default for section in members(union)}


@pytest.mark.parametrize(
    ("union", "module"),
    [
        (recipes.ObjectiveRecipe, objective_builders),
        (recipes.RolloutRecipe, rollout_builders),
        (recipes.TeacherRecipe, teacher_builders),
    ],
    ids=["objectives", "rollouts", "teachers"],
)
def test_every_section_has_a_builder(union, module):
    assert len(members(union)) > 1
    # No teacher is built for a recipe of several runs: each of its runs has another kind of teacher.
    built = {one for one in members(union) if not getattr(one, "several_runs", False)}
    assert built == set(module._BUILDERS)


CHOICES = [
    (section, field, name)
    for module in (objective_builders, rollout_builders)
    for section in module._BUILDERS
    for field, table in section.CHOICES.items()
    for name in table.entries
]


@pytest.mark.parametrize(("section", "field", "entry"), CHOICES)
def test_every_entry_of_a_table_is_built_from_a_recipe(section, field, entry):
    """Each entry is built with the defaults of its options."""
    given, table = (
        {"kind": section.model_fields["kind"].default, field: entry},
        section.CHOICES[field],
    )
    module = importlib.import_module(
        f"llmdistill.{table.path.removesuffix('.py').replace('/', '.')}"
    )
    wanted = getattr(module, table.name)[entry]
    if section in rollout_builders._BUILDERS:
        built = getattr(rollout_builders.build_rollout(section(**given)), field)
        assert isinstance(built, wanted)
    else:
        built = getattr(objective_builders.build_objectives([section(**given)])[0], field)
        assert getattr(built, "func", built) is wanted


def test_a_field_that_names_an_entry_is_listed_with_its_table():
    """`one_of` checks such fields, so the tests above can find the table."""
    for module in (objective_builders, rollout_builders):
        for section in module._BUILDERS:
            named = {
                name
                for name, field in section.model_fields.items()
                if any(isinstance(one, AfterValidator) for one in field.metadata)
            }
            assert named == set(section.CHOICES)


@pytest.mark.parametrize(
    ("path", "table"),
    [("objectives/divergences.py", "DIVERGENCES"), ("rollouts/acceptance.py", "ACCEPT")],
)
def test_bounds_belong_to_options(path, table):
    bounds = tables.constant(path, "BOUNDS")
    assert bounds
    for entry, option in bounds:
        assert option in tables.options(path, table, entry), (entry, option)


def test_every_schedule_has_a_section():
    assert kinds(Weight) | kinds(Share) == {*SCHEDULES, "constant"}


ROWS = [  # one per format; add a row here for a new format
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "", "output": "b"},
    {"text": "b"},
]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_may_be_said_and_is_read_and_recognised(form):
    data = {"train": {"source": "x.jsonl", "format": form}}
    assert entries.recipe(data=data).data.train[0].format == form
    key, _ = FORMATS[form]
    row = next(row for row in ROWS if key in row)
    (example,) = to_examples(row, "row 0", form=form)
    assert example.response == "b"
    assert to_examples(row, "row 0", form="auto") == [example]


def test_an_unknown_format_is_named_with_a_suggestion():
    data = {"train": {"source": "x.jsonl", "format": "alpacca"}}
    with pytest.raises(RecipeError, match="'data.train.format' should be one of auto, .*'alpaca'"):
        entries.recipe(data=data)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_quantization_may_be_said_and_has_a_size(kind):
    teacher = {"model": "t", "quantization": kind}
    assert entries.recipe(teacher=teacher).teacher.models[0].quantization == kind
    assert 0 < QUANTIZATIONS[kind].bytes_per_weight < 2


def test_every_figure_has_a_meaning():
    assert {field.name for field in fields(Figures)} == set(MEANING)
