"""Properties of every rollout, with every acceptance rule."""

from __future__ import annotations

import pytest
import torch

from llmdistill import recipe as recipes
from llmdistill.rollouts.build import build_rollout
from llmdistill.teachers.local import LocalTeacher
from tests.conformance import entries
from tests.support.spies import spy
from tests.training.helpers import dataset, gradient, trainer, weights

pytestmark = pytest.mark.slow

ROLLOUTS = entries.rollouts()
each = pytest.mark.parametrize("name", ROLLOUTS)


def section(name):
    return entries.recipe(rollout=ROLLOUTS[name]).rollout


def rollout(name):
    return build_rollout(section(name))


@each
def test_its_section_says_what_it_does(tmp_path, name):
    """The section gives lengths, who steps, and whether the dataset's responses are needed."""
    asked, made = section(name), rollout(name)
    assert asked.who_writes
    shares = [share for _, share in asked.branches]
    assert sum(share or 0.0 for share in shares) == pytest.approx(1.0)
    written, sessions = spy(made, "write"), spy(LocalTeacher, "session")
    trainer(tmp_path, rollout=made, rows=dataset(8), max_steps=2).train()
    assert bool(sessions) == asked.steps_both_models
    longest = max(int(sequences.num_predicted.max()) for sequences in written)
    if asked.takes_data:
        assert longest > entries.NEW_TOKENS
    else:
        assert 0 < longest <= asked.new_tokens == entries.NEW_TOKENS


@each
def test_accumulation_changes_nothing(tmp_path, name):
    """N4: a row gets the same response in any micro-batch."""
    expected = gradient(tmp_path, rollout=rollout(name), per_device_train_batch_size=8)
    found = gradient(
        tmp_path, rollout=rollout(name), per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@each
def test_a_resumed_run_is_a_straight_one(tmp_path, name):
    """R1: the rollout's state is restored; equality is up to rounding, as block sizes may differ."""
    options = {"rows": dataset(8), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = trainer(tmp_path / "a", rollout=rollout(name), **options)
    straight.train()
    again = trainer(tmp_path / "b", rollout=rollout(name), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    torch.testing.assert_close(
        weights(again.model.student), weights(straight.model.student), rtol=0, atol=1e-5
    )


@each
def test_its_recipe_comes_back_from_a_dump(name):
    recipe = entries.recipe(rollout=ROLLOUTS[name])
    assert recipes.build(recipes.parse_yaml(recipes.dump(recipe), "x")) == recipe
