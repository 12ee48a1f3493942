"""The block size that costs least per token, from what was measured."""

from __future__ import annotations

import random

import pytest

from llmdistill.rollouts.draft_length import (
    DRAFT_LENGTHS,
    TRIAL_LENGTHS,
    AutoBlock,
    Costs,
    Measured,
    expected,
)


def test_a_block_brings_its_accepted_head_and_a_replacement():
    """By drawing: accepted one by one with probability a, until the first refusal."""
    draw = random.Random(0)
    for size, acceptance in ((1, 0.3), (4, 0.8), (8, 0.95), (5, 0.0), (3, 1.0)):
        total = 0
        for _ in range(20_000):
            kept = 1
            while kept < size and draw.random() < acceptance:
                kept += 1
            total += kept
        assert expected(size, acceptance) == pytest.approx(total / 20_000, rel=0.02)


def test_costs_are_interpolated_between_what_was_measured():
    costs = Costs()
    assert costs(4) == 0.0
    for tokens, seconds in ((8, 3.0), (8, 2.0), (8, 9.0), (16, 4.0)):
        costs.add(tokens, seconds)
    assert costs(8) == 2.0  # the least: others had something in their way
    assert costs(12) == 3.0
    assert costs(16) == 4.0
    assert costs(2) == 2.0
    assert costs(32) == 8.0  # goes on as it rose
    costs.add(32, 4.0)
    assert costs(64) == 4.0  # flat


def test_old_measurements_are_forgotten():
    costs = Costs()
    for seconds in (1.0, 5.0, 5.0, 5.0, 5.0):
        costs.add(8, seconds)
    assert costs(8) == 5.0


def learned(*, draft, judge, acceptance, rows=8):
    """An AutoBlock that has tried what there is, with these costs."""
    auto = AutoBlock(64)
    while auto.choose(rows) is not None and auto._untried:
        size = auto.choose(rows)
        kept = 1000
        auto.learn(
            Measured(rows, size, size * draft(rows), judge(rows * size), acceptance * kept, kept)
        )
    return auto


def test_it_tries_small_and_large_blocks_first():
    auto, seen = AutoBlock(64), []
    for _ in TRIAL_LENGTHS:
        seen.append(auto.choose(4))
        auto.learn(Measured(4, seen[-1], 0.1, 0.1, 1, 1))
    assert seen == list(TRIAL_LENGTHS) == [4, 1, 8, 2] * 2
    auto.learn(Measured(4, 3, 0.1, 0.1, 1, 1))
    assert auto.choose(4) in DRAFT_LENGTHS


def test_a_block_that_was_cut_short_does_not_count_as_tried():
    auto = AutoBlock(64)
    auto.learn(Measured(4, 2, 0.1, 0.1, 1, 1))  # 4 was asked for; there was room for 2
    assert auto.choose(4) == 4


FLAT, STEEP = (lambda n: 1.0), (lambda n: n * 0.1)


@pytest.mark.parametrize(
    ("draft", "judge", "acceptance", "size"),
    [
        (lambda n: 0.3, FLAT, 0.95, 8),  # bound by memory: a judgement costs the same
        (lambda n: 0.1, FLAT, 0.0, 1),  # nothing stays
        (lambda n: 1.0, STEEP, 0.8, 1),  # bound by arithmetic
        (lambda n: 0.01, FLAT, 1.0, 16),
    ],
)
def test_it_takes_what_costs_least_per_token(draft, judge, acceptance, size):
    found = learned(draft=draft, judge=judge, acceptance=acceptance).choose(8)
    assert found == size or (size == 8 and found in (6, 8, 12))


def test_it_is_the_argmin_of_the_formula():
    draw = random.Random(1)
    for _ in range(50):
        base, slope, cost, acceptance = (draw.random() for _ in range(4))

        def judge(n, base=base, slope=slope):
            return base + slope * n / 16

        def per_token(g, cost=cost, acceptance=acceptance, judge=judge):
            tokens = (1 - acceptance**g) / (1 - acceptance)
            return (g * cost + judge(8 * g)) / tokens

        found = learned(draft=lambda n, cost=cost: cost, judge=judge, acceptance=acceptance)
        best = min((1, 2, 3, 4, 5, 6, 8), key=per_token)  # beyond 8 it extrapolates
        chosen = found.choose(8)
        assert per_token(chosen) <= 1.05 * per_token(best)


def test_it_follows_the_acceptance():
    auto = learned(draft=lambda n: 0.1, judge=FLAT, acceptance=0.95)
    before = auto.choose(8)
    for _ in range(300):
        auto.learn(Measured(8, 4, 0.4, 1.0, 0, 10))
    assert auto.choose(8) < before


def test_sizes_that_no_answer_has_room_for_are_not_tried():
    auto, seen = AutoBlock(6), []
    for _ in range(12):
        seen.append(auto.choose(4))
        auto.learn(Measured(4, min(seen[-1], 6), 0.1, 10.0, 99, 100))
    assert seen[:6] == [4, 1, 2] * 2
    assert seen[6:] == [16] * 6  # of which as much is drafted as there is room for
