"""Schedules have the values of their formulas."""

from __future__ import annotations

import math

import pytest

from llmdistill.protocols import Progress
from llmdistill.recipe import objectives, rollouts
from llmdistill.schedules import (
    SCHEDULES,
    Adaptive,
    Cosine,
    CriticalPeriod,
    Exponential,
    Linear,
    build_schedule,
    value,
)


def at(step, num_steps=101, losses=()):
    return Progress(step=step, epoch=0, seed=0, num_steps=num_steps, eval_losses=losses)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(0.2, 1.0), [0.2, 0.4, 0.6, 1.0]),
        (Cosine(1.0, 0.0), [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.0]),
        (Exponential(1.0, 0.0001), [1.0, 0.1, 0.01, 0.0001]),
    ],
)
def test_from_the_first_step_to_the_last(schedule, values):
    assert [schedule(at(step)) for step in (0, 25, 50, 100)] == pytest.approx(values)
    assert schedule(at(500)) == pytest.approx(values[-1])  # the end is kept
    assert schedule(at(0, num_steps=1)) == pytest.approx(values[0])


def test_a_critical_period_falls_by_the_same_factor_after_each_part():
    """100, 70, ..., 2.82 after ten periods, one period being 2% of the run."""
    schedule = CriticalPeriod(100.0)
    values = [schedule(at(step, 1000)) for step in (0, 19, 20, 39, 200)]
    assert values == pytest.approx([100.0, 100.0, 70.0, 70.0, 100 * 0.7**10])
    assert schedule(at(200, 1000)) == pytest.approx(2.82, abs=0.01)
    assert CriticalPeriod(8.0, decay=0.5, periods=4)(at(75, 100)) == 1.0


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], 0.1),
        ([2.0], 0.1),
        ([2.0, 2.05], 0.1),  # within the tolerance
        ([2.0, 2.1], 0.3),
        ([2.0, 1.5, 1.7], 0.1),  # compared with the first, not with the best
        ([2.0, 2.2, 2.25], 0.3),  # compared with the last rise
        ([2.0, 2.2, 2.4, 2.6], 0.7),
        ([0.0, *range(1, 9)], 1.0),  # no more than all
    ],
)
def test_an_adaptive_share_rises_with_the_held_out_loss(losses, expected):
    schedule = Adaptive(start=0.1, rise=0.2, tolerance=0.1)
    assert schedule(at(0, losses=tuple(losses))) == pytest.approx(expected)


def test_a_number_is_itself():
    assert value(0.3, at(5)) == 0.3
    assert value(Linear(0.0, 1.0), at(100)) == 1.0


WEIGHTS = {
    "linear": ({"start": 1.0, "end": 0.0}, Linear(1.0, 0.0)),
    "cosine": ({"start": 1.0, "end": 0.0}, Cosine(1.0, 0.0)),
    "exponential": ({"start": 1.0, "end": 0.5}, Exponential(1.0, 0.5)),
    "critical_period": ({"start": 9.0, "periods": 5}, CriticalPeriod(9.0, 0.7, 5)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_recipe_builds_each_weight(kind):
    fields, expected = WEIGHTS[kind]
    section = objectives.HiddenRecipe(weight={"kind": kind, **fields})
    assert build_schedule(section.weight) == expected
    assert build_schedule(objectives.HiddenRecipe(weight=0.5).weight) == 0.5


def test_every_schedule_can_be_asked_for():
    """As a weight, or as a share of a rollout."""
    adaptive = rollouts.MixedRecipe(share={"kind": "adaptive"}).share
    assert build_schedule(adaptive) == Adaptive()
    assert set(SCHEDULES) == {*WEIGHTS, "adaptive"}


@pytest.mark.parametrize(
    ("share", "mean"),
    [
        (0.3, 0.3),
        ({"kind": "linear", "start": 0.2, "end": 1.0}, 0.6),
        ({"kind": "cosine", "start": 1.0, "end": 0.0}, 0.5),
        ({"kind": "adaptive"}, None),
    ],
)
def test_the_branches_of_a_mixture_have_the_mean_share(share, mean):
    mixed = rollouts.MixedRecipe(share=share)
    (student, own), (other, rest) = mixed.branches
    assert (student.who_writes, other.who_writes) == ("the student", "the dataset")
    assert own == (pytest.approx(mean) if mean is not None else None)
    assert rest == (pytest.approx(1 - mean) if mean is not None else None)
