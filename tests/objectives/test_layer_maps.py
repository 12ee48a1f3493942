"""Layer maps give the pairs that their papers say, and refuse models that they do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmdistill.errors import ModelError, RecipeError
from llmdistill.models.carve import keep_layers
from llmdistill.objectives.layer_maps import LAYER_MAPS, layer_pairs, spread
from tests import toy

PAIRS = {  # a student of 4 layers and a teacher of 12
    "last": [(1, 9), (2, 10), (3, 11), (4, 12)],
    "skip": [(1, 3), (2, 6), (3, 9), (4, 12)],
    "uniform": [(1, 3), (2, 6), (3, 9), (4, 12)],
    "carved": [(1, 1), (2, 4), (3, 5), (4, 12)],
}


def model(layers, **more):
    return SimpleNamespace(num_hidden_layers=layers, **more)


def test_every_map_is_tested():
    assert set(PAIRS) == set(LAYER_MAPS)


@pytest.mark.parametrize("name", LAYER_MAPS)
def test_a_map_gives_its_pairs(name):
    student = model(4, carved_layers=[1, 4, 5, 12], carved_from_depth=12)
    assert list(layer_pairs(name, student, model(12))) == PAIRS[name]


def test_uniform_rounds_to_the_nearest_layer():
    pairs = layer_pairs("uniform", model(20), model(30))
    assert pairs[:4] == [(1, 2), (2, 3), (3, 5), (4, 6)]  # 1.5 and 4.5 are rounded up
    assert pairs[-1] == (20, 30)
    assert layer_pairs("uniform", model(3), model(1)) == [(1, 1), (2, 1), (3, 1)]


def test_pairs_and_functions_are_taken_as_they_are():
    pairs = [[1, 2], [-1, -1]]
    assert layer_pairs(pairs, model(4), model(12)) == pairs
    assert layer_pairs(lambda s, t: [(s.num_hidden_layers, 1)], model(4), model(12)) == [(4, 1)]


@pytest.mark.parametrize(
    ("name", "student", "teacher", "what"),
    [
        ("skip", model(4), model(10), "'skip' needs a teacher with a multiple of the student's"),
        ("last", model(4), model(3), "'last' needs a teacher with at least as many layers"),
        ("carved", model(4), model(12), "'carved' needs a student that was carved"),
        (
            "carved",
            model(2, carved_layers=[1, 4], carved_from_depth=5),
            model(8),
            "from a model of 5 layers, but the teacher has 8",
        ),
    ],
)
def test_a_map_that_does_not_fit_is_refused(name, student, teacher, what):
    with pytest.raises(ModelError, match=what):
        layer_pairs(name, student, teacher)


def test_an_unknown_map_is_named():
    with pytest.raises(
        RecipeError, match="unknown layers 'unifrm'. Use one of last, skip, uniform"
    ):
        layer_pairs("unifrm", model(4), model(12))


def test_a_carved_student_knows_where_its_layers_come_from():
    student = keep_layers(toy.teacher_model(), [0, 2, 3])
    assert layer_pairs("carved", student.config, model(4)) == [(1, 1), (2, 3), (3, 4)]
    again = keep_layers(student, [1, 2])  # of the model that it was carved from
    assert layer_pairs("carved", again.config, model(3)) == [(1, 2), (2, 3)]
    with pytest.raises(ModelError, match="from a model of 3 layers, but the teacher has 4"):
        layer_pairs("carved", again.config, model(4))


def test_spread_layers_end_with_the_last_one():
    assert spread(30, 4) == [7, 15, 22, 30]
    assert spread(3, 8) == [1, 2, 3]
