"""Properties of every objective, with every divergence, target, token weight and distance."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llmdistill import recipe as recipes
from llmdistill.batch import Sequences
from llmdistill.objectives.build import build_objective
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.conformance import entries
from tests.support.rollouts import Repadded
from tests.support.teachers import trained
from tests.training.helpers import dataset, gradient, trainer, weights

pytestmark = pytest.mark.slow

OBJECTIVES = entries.objectives()
each = pytest.mark.parametrize("name", OBJECTIVES)


def section(name):
    return entries.recipe(objectives=[OBJECTIVES[name]]).objectives[0]


def objective(name, **changes):
    return build_objective(section(name).model_copy(update=changes))


@each
def test_its_section_says_what_it_needs(name):
    needs = {need.kind.what for need in objective(name).teacher_needs}
    assert section(name).teacher_needs == needs


@each
def test_its_weight_scales_the_gradient(tmp_path, name):
    """N0: the objective changes the student, and its weight scales that change."""
    once = gradient(tmp_path, objectives=[objective(name)])
    assert once.norm() > 1e-3
    twice = gradient(tmp_path, objectives=[objective(name, weight=2.0)])
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-6)


@each
def test_accumulation_changes_nothing(tmp_path, name):
    """N4: every objective gives the same gradient, except one that compares samples."""
    if objective(name).compares_samples:
        pytest.skip("it compares the samples of a micro-batch")
    expected = gradient(tmp_path, objectives=[objective(name)], per_device_train_batch_size=8)
    found = gradient(
        tmp_path, objectives=[objective(name)], per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max())


@each
def test_padding_changes_nothing(tmp_path, monkeypatch, name):
    expected = gradient(tmp_path, objectives=[objective(name)], per_device_train_batch_size=8)
    monkeypatch.setattr(Sequences, "select", lambda self, rows: self)  # keep the padding
    found = gradient(
        tmp_path, objectives=[objective(name)], per_device_train_batch_size=8,
        rollout=Repadded(3, 11),
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max())


@each
def test_a_batch_without_predicted_tokens_adds_nothing(tmp_path, name):
    """N6: rows with an empty response add nothing to the loss of the predicted tokens."""
    data = dataset()
    few = type(data)(data.rows[:4])
    expected = gradient(tmp_path, rows=few, objectives=[objective(name)])
    emptied = [type(row)(row.row_id, row.prompt_ids, []) for row in data.rows[4:]]
    found = gradient(
        tmp_path, rows=type(data)(data.rows[:4] + emptied), objectives=[objective(name)],
        per_device_train_batch_size=1, gradient_accumulation_steps=8,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max())


@each
def test_the_teacher_is_left_as_it_was(tmp_path, name):
    """N8: training does not change the teacher."""
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    before = weights(teacher.model)
    trainer(tmp_path, teacher=teacher, objectives=[objective(name)], max_steps=2).train()
    assert torch.equal(weights(teacher.model), before)
    assert not teacher.model.training


@each
def test_a_resume_is_bit_equal_and_the_export_holds_the_student_alone(tmp_path, name):
    """R1, R12: this includes the parameters of the objective."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    straight = trainer(tmp_path / "a", objectives=[objective(name)], **options)
    straight.train()
    again = trainer(tmp_path / "b", objectives=[objective(name)], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert torch.equal(trained(again), trained(straight))
    straight.export_student(tmp_path / "student")
    exported = load_file(tmp_path / "student/model.safetensors")
    plain = toy.model().state_dict()
    assert set(exported) <= set(plain)


@each
def test_its_recipe_comes_back_from_a_dump(name):
    recipe = entries.recipe(objectives=[OBJECTIVES[name]])
    assert recipes.build(recipes.parse_yaml(recipes.dump(recipe), "x")) == recipe
