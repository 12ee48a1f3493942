"""What a recipe may say is what the tables hold."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from llmdistill import recipe as recipes
from llmdistill.data.formats import FORMATS, to_examples
from llmdistill.errors import RecipeError
from llmdistill.models.quantization import QUANTIZATIONS
from llmdistill.objectives.build import _BUILDERS as OBJECTIVES
from llmdistill.recipe.schedules import Share, Weight
from llmdistill.rollouts.build import _BUILDERS as ROLLOUTS
from llmdistill.schedules import SCHEDULES
from llmdistill.teachers.build import _BUILDERS as TEACHERS
from tests.conformance import entries

UNIONS = {
    "teachers": (recipes.TeacherRecipe, TEACHERS),
    "rollouts": (recipes.RolloutRecipe, ROLLOUTS),
    "objectives": (recipes.ObjectiveRecipe, OBJECTIVES),
}


def members(union) -> set[str]:
    """The kinds of a union of sections."""
    schema = TypeAdapter(union).json_schema()
    return {
        one["properties"]["kind"]["const"]
        for one in schema["$defs"].values()
        if "kind" in one["properties"]
    }


@pytest.mark.parametrize("name", UNIONS)
def test_every_kind_that_may_be_said_is_built(name):
    union, builders = UNIONS[name]
    kinds = {one.model_fields["kind"].default for one in builders}
    assert {one for one in members(union) if one in kinds} == kinds
    for builder in builders:
        kind = builder.model_fields["kind"].default
        assert kind in members(union)


def test_every_schedule_may_be_said():
    assert members(Weight) | members(Share) == {*SCHEDULES, "constant"}


ROWS = [  # of any format; a new format adds one here
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
    with pytest.raises(
        RecipeError, match="'data.train.format': should be one of auto, mess.*'alpaca'"
    ):
        entries.recipe(data=data)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_quantization_may_be_said_and_has_a_size(kind):
    teacher = {"model": "t", "quantization": kind}
    assert entries.recipe(teacher=teacher).teacher.weights.quantization == kind
    assert 0 < QUANTIZATIONS[kind].bytes_per_weight < 2
