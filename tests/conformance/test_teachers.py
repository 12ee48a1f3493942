"""Properties of every kind of teacher that a recipe can have."""

from __future__ import annotations

import pytest
import torch

from llmdistill import recipe as recipes
from llmdistill.data.collate import PromptDataset
from llmdistill.models.load import load_tokenizer
from llmdistill.models.taps import STATES, Need
from llmdistill.run import load_pair
from llmdistill.training.step import Distillation
from tests import toy
from tests.conformance import entries
from tests.training.helpers import dataset, trainer

TEACHERS = entries.teachers()
each = pytest.mark.parametrize("name", TEACHERS)


def loaded(name, pair, **parts):
    """Return a recipe with this teacher on the toy pair, the teacher and the student."""
    teacher, student = pair
    asked = TEACHERS[name]
    fields = next(
        one for one in entries.TEACHERS if one.model_fields["kind"].default == asked["kind"]
    ).model_fields
    given = {"model": teacher, "dtype": "float32"}
    section = asked | {name: value for name, value in given.items() if name in fields}
    own = {} if "model" in fields else {"peft": {"r": 4}}
    recipe = entries.recipe(teacher=section, student={"model": student} | own)
    tokenizer = load_tokenizer(student)
    return recipe, *load_pair(recipe, tokenizer, PromptDataset.of(toy.rows(4), tokenizer))


@each
def test_its_section_says_what_it_provides(name, pair):
    recipe, teacher, _ = loaded(name, pair)
    assert recipe.teacher.provides == {need.what for need in teacher.provides}
    assert (recipe.teacher.weights is None) == (recipe.teacher.source(recipe.student)[0] == pair[1])
    assert recipes.build(recipes.parse_yaml(recipes.dump(recipe), "x")) == recipe


@each
def test_it_gives_all_that_it_provides_and_nothing_else(name, pair):
    _, teacher, _ = loaded(name, pair)
    sequences = toy.sequences()
    for need in teacher.provides:
        asked = need.after(1) if need in STATES else need
        signal = teacher.judge(sequences, frozenset({asked}))
        assert signal.covers(frozenset({asked}))
        assert (signal.distribution is None) == (need is not Need.DISTRIBUTION)
        assert len(signal.states) == (need in STATES)
        assert not any(state.requires_grad for state in signal.states.values())


@each
def test_a_step_leaves_its_weights_as_they_were(name, pair, tmp_path):
    """N8: the teacher also scores its own text the same before and after."""
    _, teacher, student = loaded(name, pair)
    sequences = toy.sequences()
    needs = frozenset({Need.DISTRIBUTION})
    number = int(sequences.num_predicted.sum())
    before = teacher.judge(sequences, needs).distribution.serve()[0:number].clone()
    made = trainer(
        tmp_path, teacher=teacher, student=student, rows=dataset(8), max_steps=2,
        learning_rate=1.0, objectives=None,
    )  # fmt: skip
    assert isinstance(made.model, Distillation)
    made.train()
    after = teacher.judge(sequences, needs).distribution.serve()[0:number]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
