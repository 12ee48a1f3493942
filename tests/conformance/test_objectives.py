"""Properties of every objective, with every divergence, target, token weight and distance."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llmdistill import recipe as recipes
from llmdistill.batch import Sequences
from llmdistill.objectives.build import build_objectives
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.conformance import entries, golden
from tests.support.objectives import LargestTensor, loss, prepared
from tests.support.rollouts import Repadded
from tests.training.helpers import dataset, gradient, trained, trainer, weights

pytestmark = pytest.mark.slow

OBJECTIVES = entries.objectives()
each = pytest.mark.parametrize("name", OBJECTIVES)
CONTRASTIVE = {
    "-".join([kind, *pool]) for kind in ("crd", "icd", "rrd") for pool in ((), ("last",))
}
each_kind = pytest.mark.parametrize("name", entries.main_objectives())


def section(name):
    return entries.recipe(objectives=[OBJECTIVES[name]]).objectives[0]


def objective(name, **changes):
    """Return the objectives of a section; most sections make one."""
    return build_objectives([section(name).model_copy(update=changes)])


def compares_samples(name):
    return any(one.compares_samples for one in objective(name))


def assert_same(found, expected):
    """A gradient that is read off the weights has their rounding error."""
    torch.testing.assert_close(found, expected, rtol=0, atol=max(1e-5 * expected.abs().max(), 1e-7))


@each
def test_its_section_says_what_it_needs(name):
    needs = {need.kind.what for one in objective(name) for need in one.teacher_needs}
    assert section(name).teacher_needs == needs


@each
def test_its_weight_scales_the_gradient(tmp_path, name):
    """N0: the objective changes the student, and its weight scales that change."""
    weights = [
        field for field in type(section(name)).model_fields if field in ("weight", "inner_weight")
    ]
    once = gradient(tmp_path, objectives=objective(name, **dict.fromkeys(weights, 1.0)))
    assert once.norm() > 1e-3
    twice = gradient(tmp_path, objectives=objective(name, **dict.fromkeys(weights, 2.0)))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-6)


@each_kind
def test_accumulation_changes_nothing(tmp_path, name):
    """N4: every objective gives the same gradient, except one that compares samples."""
    if compares_samples(name):
        pytest.skip("it compares the samples of a micro-batch")
    expected = gradient(tmp_path, objectives=objective(name), per_device_train_batch_size=8)
    found = gradient(
        tmp_path, objectives=objective(name), per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    assert_same(found, expected)


@each_kind
def test_padding_changes_nothing(tmp_path, monkeypatch, name):
    expected = gradient(tmp_path, objectives=objective(name), per_device_train_batch_size=8)
    monkeypatch.setattr(Sequences, "select", lambda self, rows: self)  # keep the padding
    found = gradient(
        tmp_path, objectives=objective(name), per_device_train_batch_size=8,
        rollout=Repadded(3, 11),
    )  # fmt: skip
    assert_same(found, expected)


@each_kind
def test_a_batch_without_predicted_tokens_adds_nothing(tmp_path, name):
    """N6: rows with an empty response add nothing to the loss of the predicted tokens.

    Each such row is a separate micro-batch, unless the samples of a micro-batch are compared.
    """
    data = dataset()
    few = type(data)(data.rows[:4])
    expected = gradient(tmp_path, rows=few, objectives=objective(name))
    emptied = [type(row)(row.row_id, row.prompt_ids, []) for row in data.rows[4:]]
    size = 8 if compares_samples(name) else 1
    found = gradient(
        tmp_path, rows=type(data)(data.rows[:4] + emptied), objectives=objective(name),
        per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
    )  # fmt: skip
    assert_same(found, expected)


@each_kind
def test_the_teacher_is_left_as_it_was(tmp_path, name):
    """N8: training does not change the teacher."""
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    before = weights(teacher.model)
    trainer(tmp_path, teacher=teacher, objectives=objective(name), max_steps=2).train()
    assert torch.equal(weights(teacher.model), before)
    assert not teacher.model.training


@each_kind
def test_a_resume_is_bit_equal_and_the_export_holds_the_student_alone(tmp_path, name):
    """R1, R12: this includes the parameters of the objective."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    straight = trainer(tmp_path / "a", objectives=objective(name), **options)
    straight.train()
    again = trainer(tmp_path / "b", objectives=objective(name), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert torch.equal(trained(again), trained(straight))
    straight.export_student(tmp_path / "student")
    exported = load_file(tmp_path / "student/model.safetensors")
    plain = toy.model().state_dict()
    assert set(exported) <= set(plain)


def totals(name, student, teacher, sequences, **changes):
    """Return the loss of each objective of a section, with gradients for the student."""
    torch.manual_seed(0)  # of the projectors
    made = [prepared(one, student, teacher) for one in objective(name, **changes)]
    return torch.stack([loss(one, student, teacher, sequences).total for one in made])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if section(name).teacher_needs])
def test_a_student_like_its_teacher_has_the_minimum(name):
    """N2: it is 0 for every objective, and the gradient is 0 as well.

    The attention of rtk compares different layers, so one layer of each model is compared here.
    """
    if name in CONTRASTIVE:
        pytest.skip("its projectors of equal models differ")
    if name == "adversarial":
        pytest.skip("its models read different inputs")
    teacher = LocalTeacher(toy.model(), toy.tokenizer())
    one_layer = {"num_layers": 1} if "num_layers" in type(section(name)).model_fields else {}
    student = toy.model()
    found = totals(name, student, teacher, toy.sequences(), **one_layer)
    assert found.abs().max() < 2e-3
    found.sum().backward()
    grads = [p.grad.abs().max() for p in student.parameters() if p.grad is not None]
    different = LocalTeacher(toy.model(seed=3), toy.tokenizer())
    assert totals(name, student, different, toy.sequences(), **one_layer).sum() > 1e-3
    assert max(grads) < 0.05


@each
def test_the_order_of_the_batch_changes_nothing(name):
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences(6)
    mixed = sequences.select(torch.tensor([4, 0, 5, 2, 1, 3]))
    expected = totals(name, student, teacher, sequences)
    torch.testing.assert_close(
        totals(name, student, teacher, mixed), expected, rtol=1e-4, atol=1e-5
    )


@each
def test_makes_no_tensor_of_n_x_v(name):
    """N0: neither in the forward pass nor in the backward pass."""
    student, teacher = toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())
    sequences = toy.sequences(60, longest=40)
    made = [prepared(one, student, teacher) for one in objective(name)]
    number = int(sequences.num_predicted.sum()) * toy.NUM_TOKENS
    assert number > 8 * student.get_output_embeddings().weight.numel()
    for one in made:
        getattr(one, "inner", one).chunk_size = 16
        with LargestTensor() as watch:
            loss(one, student, teacher, sequences).total.backward()
        assert watch.largest < number


@each
def test_twenty_steps_have_the_losses_that_are_kept(tmp_path, name):
    """N10: `python -m tests.conformance.golden` writes them; see that a change is meant."""
    found = golden.losses(tmp_path, objectives=objective(name))
    assert found == pytest.approx(golden.KEPT[name], rel=2e-3, abs=1e-6)
    assert len(found) == golden.STEPS
    assert found[-1] < found[0]


@each
def test_its_recipe_comes_back_from_a_dump(name):
    recipe = entries.recipe(objectives=[OBJECTIVES[name]])
    assert recipes.build(recipes.parse_yaml(recipes.dump(recipe), "x")) == recipe
