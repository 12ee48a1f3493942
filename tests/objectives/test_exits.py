"""BYOT: exits of the student that learn from its last layer (Zhang et al. 2019)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmdistill.batch import LossSum
from llmdistill.errors import ModelError, RecipeError
from llmdistill.forward import read
from llmdistill.models.adapters import add_adapter
from llmdistill.models.load import load_model
from llmdistill.models.taps import Need
from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.exits import ExitsObjective, exit_layers
from llmdistill.objectives.response import CrossEntropyObjective
from llmdistill.sampling import Writer
from llmdistill.teachers.reflexive import ReflexiveTeacher
from tests import toy
from tests.conformance import entries
from tests.training.helpers import dataset, trainer, weights


def ready(model, **options) -> ExitsObjective:
    torch.manual_seed(0)
    objective = ExitsObjective(**options)
    objective.prepare(model.config, None)
    objective.start_from(model)
    return objective


def loss(objective, model, sequences) -> LossSum:
    view = read(model, sequences, toy.NUM_TOKENS, objective.student_needs)
    return objective(view, None, sequences)


def test_an_exit_after_the_last_layer_is_the_last_layer():
    """N13: with an adaptor that is the identity, the divergence is 0."""
    model, sequences = toy.model(layers=4), toy.sequences()
    for adaptor in ("norm", "mlp"):
        objective = ready(model, layers=[4], alpha=1.0, state_weight=1.0, adaptor=adaptor)
        assert loss(objective, model, sequences).total.item() == pytest.approx(0, abs=1e-4)


def test_the_loss_is_the_formula():
    """(1 - alpha) CE + alpha T^2 KL + lambda |F_i - F_C|^2, a mean over the exits."""
    model, sequences = toy.model(layers=4), toy.sequences()
    objective = ready(model, layers=[1, 3], alpha=0.3, temperature=3.0, state_weight=0.5)
    for module in objective.adaptors:
        nn.init.normal_(module.down.weight, 0, 0.1)
    found = loss(objective, model, sequences).total
    view = read(model, sequences, toy.NUM_TOKENS, objective.student_needs)
    last = view.hidden_NH.detach()
    expected = 0
    for place, layer in enumerate([1, 3]):
        state = objective.norms[place](view.states[Need.HIDDEN.after(layer)])
        state = objective.adaptors[place](state)
        logits = state @ view.head.weight_VH.detach().t()
        kl = forward_kl(logits, last @ view.head.weight_VH.detach().t(), temperature=3.0).sum()
        ce = nn.functional.cross_entropy(logits, sequences.targets_N, reduction="sum")
        gap = state / state.norm(dim=-1, keepdim=True) - last / last.norm(dim=-1, keepdim=True)
        expected = expected + (0.7 * ce + 0.3 * 9 * kl + 0.5 * gap.square().sum()) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    named = [*objective.parameters(), *model.model.layers[:3].parameters()]
    expected_grads = torch.autograd.grad(expected, named)
    found_grads = torch.autograd.grad(found, named)
    for a, b in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_it_has_no_gradient_to_the_last_layer_and_the_head():
    model, sequences = toy.model(layers=4, tie_word_embeddings=False), toy.sequences()
    loss(ready(model, layers=[1, 2]), model, sequences).total.backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad.abs().max() > 0
    for module in (model.lm_head, model.model.norm, *model.model.layers[2:]):
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_tokens_of_the_student_are_no_labels():
    model, sequences = toy.model(), toy.sequences(writer=Writer.STUDENT)
    found = loss(ready(model, layers=[1], alpha=0.0, state_weight=0.0), model, sequences)
    assert found.total.item() == 0


def self_trainer(folder, objectives, student=None, **options):
    student = student or toy.model(layers=4)
    teacher = ReflexiveTeacher(student, toy.tokenizer(), weights="live")
    return trainer(
        folder, student=student, teacher=teacher, objectives=objectives, rows=dataset(8), **options
    )


def test_without_weight_it_is_fine_tuning(tmp_path):
    found = []
    for objectives in (
        [CrossEntropyObjective()], [CrossEntropyObjective(), ExitsObjective(weight=0.0)],
    ):  # fmt: skip
        made = self_trainer(tmp_path, objectives, max_steps=2)
        made.train()
        found.append(weights(made.model.student))
    torch.testing.assert_close(found[0], found[1])


def test_the_exits_learn_and_are_dropped_on_export(tmp_path):
    objectives = [CrossEntropyObjective(), ExitsObjective(weight=0.3)]
    made = self_trainer(tmp_path / "run", objectives, max_steps=20, optim="adamw_torch",
                        learning_rate=0.01, per_device_train_batch_size=8)  # fmt: skip
    names = set(made.model.student.state_dict())
    made.train()
    losses = [entry["exits"] for entry in made.state.log_history if "exits" in entry]
    assert losses[-1] < 0.9 * losses[0]
    made.export_student(tmp_path / "student")
    loaded = load_model(str(tmp_path / "student"), dtype="float32")
    assert set(loaded.state_dict()) == names
    assert torch.equal(weights(loaded), weights(made.model.student))


def test_an_exit_is_exported_as_the_student(tmp_path):
    """The exported model gives the logits of the exit."""
    exits = ExitsObjective(layers=[2], adaptor="norm", export=2)
    made = self_trainer(tmp_path / "run", [CrossEntropyObjective(), exits], max_steps=3)
    made.train()
    made.export_student(tmp_path / "student")
    loaded = load_model(str(tmp_path / "student"), dtype="float32")
    assert loaded.config.num_hidden_layers == 2
    sequences, model = toy.sequences(), made.model.student
    view = read(model, sequences, toy.NUM_TOKENS, exits.student_needs)
    state = exits.norms[0](view.states[Need.HIDDEN.after(2)])
    own = read(loaded, sequences, toy.NUM_TOKENS)
    torch.testing.assert_close(own.head(own.hidden_NH), view.head(state), rtol=1e-4, atol=1e-4)
    assert (exits.norms[0].weight - model.model.norm.weight).abs().max() > 1e-4


def test_a_resumed_run_is_the_same_run(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole, again = (
        self_trainer(tmp_path, [CrossEntropyObjective(), ExitsObjective()], **options)
        for _ in range(2)
    )
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))


def test_quarters_are_rounded_up_and_leave_out_the_last_layer():
    assert exit_layers("quarters", 30) == [8, 15, 23]
    assert exit_layers("quarters", 3) == [1, 2]
    assert exit_layers([7, 2, 2], 8) == [2, 7]


@pytest.mark.parametrize("layers", [[0], [5], [], "quarters"])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ModelError, match="exits after layers .* do not fit a student of"):
        exit_layers(layers, 1 if layers == "quarters" else 4)


def test_what_cannot_be_exported_is_refused():
    section = {"kind": "exits", "export": 2}
    for changes in ({}, {"layers": [2]}, {"layers": [1], "adaptor": "norm"}):
        with pytest.raises(RecipeError, match="'export' needs 'adaptor: norm'"):
            entries.recipe(objectives=[section | changes])
        if changes:
            with pytest.raises(RecipeError, match="needs adaptor='norm'"):
                ExitsObjective(export=2, **changes)
    with pytest.raises(RecipeError, match="needs adaptor='norm'"):
        ExitsObjective(adaptor="norm", export=1)
    with pytest.raises(RecipeError, match="exports a part of the student"):
        entries.recipe(
            objectives=[{"kind": "exits", "layers": [1], "adaptor": "norm", "export": 1}],
            student={"model": "s", "peft": {}},
        )
    exits = ExitsObjective(layers=[1], adaptor="norm", export=1)
    student = add_adapter(toy.model(), rank=2, alpha=2, targets="all-linear", dropout=0.0, seed=0)
    with pytest.raises(ModelError, match="a student with an adapter cannot be exported"):
        exits.exported(student)
