"""Properties of every kind of teacher that a recipe can have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmdistill import recipe as recipes
from llmdistill.data.collate import PromptDataset
from llmdistill.data.validate import Rules
from llmdistill.models.layers import decoder_layers
from llmdistill.models.load import load_tokenizer
from llmdistill.models.taps import STATES, Need
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.protocols import plain
from llmdistill.run import load_pair
from llmdistill.teachers.base import TrainableTeacher
from llmdistill.training.step import Distillation
from tests import toy
from tests.conformance import entries, golden
from tests.support import vision
from tests.support.teachers import every_teacher, section_on_toys
from tests.training.helpers import dataset, trained, trainer

TEACHERS = entries.teachers()
each = pytest.mark.parametrize("name", TEACHERS)
NEEDS = frozenset({Need.DISTRIBUTION})


def loaded(name, pair):
    """Return a recipe with this teacher on the toy pair, the rows, the teacher and the student."""
    section = section_on_toys(TEACHERS[name], pair)
    student = {"model": pair[1]} | ({"peft": {"r": 4}} if name == "adapter_off" else {})
    objectives = [{"kind": "response"}, {"kind": "cross_entropy"}]
    recipe = entries.recipe(teacher=section, student=student, objectives=objectives)
    tokenizer = load_tokenizer(pair[1])
    images = vision.pictures(Path(pair[1]).parent / "pictures")
    rows = [
        row | {"input": "ab"[i % 2], "images": images[: i % 3]} for i, row in enumerate(toy.rows(8))
    ]
    reads = recipe.teacher.reads
    rules = Rules() if reads is None else Rules(**reads._asdict())
    data = PromptDataset.encode(((f"row {i}", row) for i, row in enumerate(rows)), tokenizer, rules)
    return recipe, data, *load_pair(recipe, tokenizer, data)


@each
def test_its_section_says_what_it_is(name, pair):
    recipe, _, teacher, student = loaded(name, pair)
    section = recipe.teacher
    assert section.provides == {need.what for need in teacher.provides}
    loaded_models = {one.model for one in section.models}
    assert loaded_models <= {model for model, _ in recipe.teacher_sources}
    assert bool(loaded_models) == (not section.uses_student and not section.students)
    assert section.uses_student == (getattr(teacher, "model", None) is student)
    assert (section.trains is not None) == isinstance(teacher, TrainableTeacher)
    assert section.writes == hasattr(teacher, "write")
    # A reflexive teacher has the method of its base class, and says why it cannot.
    assert section.steps == (hasattr(teacher, "session") and name != "reflexive")
    assert recipes.build(recipes.parse_yaml(recipes.dump(recipe), "x")) == recipe


@each
def test_it_gives_all_that_it_provides_and_nothing_else(name, pair):
    _, _, teacher, _ = loaded(name, pair)
    sequences = toy.sequences()
    for need in teacher.provides:
        asked = need.after(1) if need in STATES else need
        signal = teacher.judge(sequences, frozenset({asked}))
        assert signal.covers(frozenset({asked}))
        assert (signal.distribution is None) == (need is not Need.DISTRIBUTION)
        assert len(signal.states) == (need in STATES)
        if not isinstance(teacher, TrainableTeacher):
            assert not any(state.requires_grad for state in signal.states.values())


def logits(teacher):
    sequences = toy.sequences()
    found = teacher.judge(sequences, NEEDS).distribution
    return found.serve()[0 : len(found)].detach().clone()


def run(folder, teacher, student, data, **options):
    # The labels too, because a student that teaches itself starts at a loss of 0.
    objectives = [ResponseObjective(), CrossEntropyObjective()]
    made = trainer(
        folder, teacher=teacher, student=student, rows=data, objectives=objectives, **options
    )
    assert isinstance(made.model, Distillation)
    before = trained(made)
    made.train()
    return before - trained(made)


@each
def test_a_step_leaves_what_a_student_is_measured_against_as_it_was(name, pair, tmp_path):
    """N8: the frozen teacher scores its own text the same before and after."""
    recipe, data, teacher, student = loaded(name, pair)
    if not recipe.teacher.is_reference:
        pytest.skip("it is not measured against")
    before = logits(plain(teacher))
    run(tmp_path, teacher, student, data, max_steps=2, learning_rate=1.0)
    torch.testing.assert_close(logits(plain(teacher)), before, rtol=0, atol=0)


@each
def test_accumulation_changes_nothing_that_is_trained(name, pair, tmp_path):
    """N4: one batch of 8 or 4 of 2, for the student and for what trains along."""
    found = []
    for steps in (1, 4):
        _, data, teacher, student = loaded(name, pair)
        options = {"learning_rate": 1.0, "per_device_train_batch_size": 8 // steps}
        found.append(
            run(tmp_path, teacher, student, data, gradient_accumulation_steps=steps, **options)
        )
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", every_teacher())
def test_twenty_steps_are_those_of_the_golden_file(tmp_path, name):
    """N10: `python -m tests.conformance.golden` writes them; see that a change is meant."""
    found = golden.losses(tmp_path, **golden.parts()[name]())
    assert found == pytest.approx(golden.KEPT[name], rel=2e-3, abs=1e-6)
    assert len(found) == golden.STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", every_teacher())
def test_a_resumed_run_is_the_same_run(tmp_path, name):
    """R1: from a checkpoint after two of four steps, everything that is trained is equal."""
    options = {
        "rows": dataset(7), "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch",
        "learning_rate": 0.01, "per_device_train_batch_size": 2,
    }  # fmt: skip

    def made():
        return trainer(tmp_path, **options | every_teacher()[name]() | {"max_steps": 4})

    whole, again = made(), made()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(trained(again), trained(whole))
    assert not torch.equal(trained(again), trained(made()))


@pytest.mark.parametrize("name", ["teacher-online", "teacher-mutual"])
def test_activation_checkpointing_saves_the_activations_of_what_trains_along(tmp_path, name):
    """Each layer runs twice in a step, its parts stay in eval mode, and the result is the same."""
    found, calls = [], []
    for checkpointing in (False, True):
        made = trainer(
            tmp_path, **{"rows": dataset(7), "activation_checkpointing": checkpointing}
            | every_teacher()[name]() | {"max_steps": 1},
        )  # fmt: skip
        layer = decoder_layers(made.model.trained_teacher.trained_models[0])[1]
        seen = []
        layer.mlp.register_forward_pre_hook(
            lambda module, _, seen=seen: seen.append(module.training)
        )
        made.train()
        found.append(trained(made))
        calls.append(seen)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    drift = name == "teacher-online"  # one more pass, without the adapter
    assert len(calls[0]) == 1 + drift
    assert len(calls[1]) == 2 + drift
    assert not any(calls[1])
