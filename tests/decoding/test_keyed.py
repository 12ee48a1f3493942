"""Draws follow the distribution, and depend on what is drawn and on nothing else."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from llmdistill.decoding import keyed
from llmdistill.decoding.keyed import cut_away, draw_tokens, gumbel, perturb, row_keys
from llmdistill.sampling import Draw, Sampling, Writer

DRAW = Draw(seed=3, epoch=1, sample=2)
ROWS = torch.arange(7)


def keys(rows=ROWS, draw=DRAW, writer=Writer.STUDENT):
    return row_keys(draw, rows, writer)


# ---- the noise ----


def test_noise_is_standard_gumbel():
    noise = gumbel(keys(torch.arange(40)), 0, 5000).double()
    count = noise.numel()
    assert noise.mean().item() == pytest.approx(0.577216, abs=4 * 1.283 / math.sqrt(count))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    for at in (-1.0, 0.0, 1.0, 3.0):
        share = math.exp(-math.exp(-at))  # the distribution function
        error = math.sqrt(share * (1 - share) / count)
        assert (noise <= at).double().mean().item() == pytest.approx(share, abs=4.5 * error)


@pytest.mark.parametrize("axis", ["tokens", "rows", "slots"])
def test_noise_has_no_neighbours(axis):
    """Neighbouring tokens, rows and slots are uncorrelated."""
    first = gumbel(keys(torch.arange(100)), 0, 1000)
    second = {
        "tokens": first.roll(1, 1),
        "rows": first.roll(1, 0),
        "slots": gumbel(keys(torch.arange(100)), 1, 1000),
    }[axis]
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.015


@pytest.mark.parametrize("bits", [0, 1, 2**23, 2**24 - 2, 2**24 - 1])
def test_extreme_bits_give_finite_noise(monkeypatch, bits):
    """Infinite noise draws a token that the distribution all but rules out."""
    monkeypatch.setattr(keyed, "_mix32", lambda x, key: torch.full_like(x, bits))
    expected = -math.log(-math.log((bits + 0.5) / 2**24))
    noise = gumbel(keys(), 0, 5)
    assert noise.isfinite().all()
    assert noise[0, 0].item() == pytest.approx(expected, abs=0.8)


def test_a_certain_token_is_drawn_from_a_large_vocabulary_every_time():
    """Row 34 once drew token 22027 here, whose 24 bits are all ones."""
    logits_BV = torch.full((50, 50_000), -100.0)
    logits_BV[:, 7] = 100.0
    assert draw_tokens(logits_BV, Sampling(), keys(torch.arange(50)), 0).unique().tolist() == [7]


def test_mixed_bits_have_24():
    bits = keyed._mix32(
        torch.arange(100_000, dtype=torch.int32), torch.tensor(5, dtype=torch.int32)
    )
    assert bits.min() >= 0
    assert bits.max() < 2**24
    assert bits.max() > 2**24 * 0.999


# ---- what it depends on ----


def test_a_rows_noise_does_not_depend_on_its_batch():
    whole = gumbel(keys(), 4, 300)
    for order in ([3], [6, 0], [5, 1, 3, 2, 6, 4, 0]):
        rows = torch.tensor(order)
        assert torch.equal(gumbel(keys(rows), 4, 300), whole[rows])


def test_a_tokens_noise_does_not_depend_on_the_size_of_the_vocabulary():
    assert torch.equal(gumbel(keys(), 4, 300)[:, :200], gumbel(keys(), 4, 200))


@pytest.mark.parametrize("block", [1, 3, 100])
def test_noise_does_not_depend_on_the_block(monkeypatch, block):
    whole = gumbel(keys(), 4, 300)
    monkeypatch.setattr(keyed, "BLOCK_ROWS", block)
    assert torch.equal(gumbel(keys(), 4, 300), whole)


@pytest.mark.parametrize(
    "other",
    [
        keys(draw=replace(DRAW, seed=4)),
        keys(draw=replace(DRAW, epoch=2)),
        keys(draw=replace(DRAW, sample=3)),
        keys(draw=Draw(seed=3, epoch=2, sample=1)),  # two parts swapped
        keys(draw=Draw(seed=1, epoch=3, sample=2)),
        keys(writer=Writer.TEACHER),
        keys(ROWS + 7),
    ],
    ids=["seed", "epoch", "sample", "swapped", "swapped seed", "writer", "row"],
)
def test_every_part_of_a_draw_gives_other_noise(other):
    assert not set(keys().tolist()) & set(other.tolist())
    assert (gumbel(keys(), 0, 200) == gumbel(other, 0, 200)).float().mean() < 0.01


def test_keys_are_distinct():
    found = {
        key
        for seed in range(4)
        for epoch in range(4)
        for sample in range(4)
        for writer in Writer
        for key in row_keys(Draw(seed, epoch, sample), torch.arange(50), writer).tolist()
    }
    assert len(found) == 4 * 4 * 4 * 3 * 50


def test_every_slot_has_other_noise():
    slots = torch.stack([gumbel(keys(), slot, 50) for slot in range(20)])
    assert len(slots.flatten().unique()) > 0.99 * slots.numel()


def test_rows_may_stand_at_different_slots():
    slot_B = torch.tensor([0, 5, 2, 9, 0, 1, 3])
    together = gumbel(keys(), slot_B, 60)
    for row, slot in enumerate(slot_B.tolist()):
        assert torch.equal(together[row], gumbel(keys(), slot, 60)[row])


def test_rows_may_have_samples_of_their_own():
    samples = (4, 0, 1, 1, 2, 9, 3)
    together = keys(draw=replace(DRAW, sample=samples))
    for row, sample in enumerate(samples):
        assert together[row] == keys(draw=replace(DRAW, sample=sample))[row]


# ---- the distribution ----


def probabilities(logits_BV, sampling):
    """What the drawn tokens should follow."""
    cut_BV = cut_away(logits_BV, sampling)
    kept_BV = logits_BV if cut_BV is None else logits_BV.masked_fill(cut_BV, -torch.inf)
    return (kept_BV / sampling.temperature).softmax(-1)


def plain_warp(logits, temperature, top_k, top_p):
    """One row, by the book: a list of probabilities, without tensors."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k:
        kept = kept[:top_k]
    mass, nucleus = sum(weights[i] for i in kept), []
    for i in kept:
        nucleus.append(i)
        if sum(weights[j] for j in nucleus) >= top_p * mass:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 4, 11, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_temperature_then_top_k_then_top_p(temperature, top_k, top_p):
    logits_BV = torch.randn(5, 11, generator=torch.Generator().manual_seed(2)) * 2
    found = probabilities(logits_BV, Sampling(temperature, top_p, top_k))
    expected = [plain_warp(row, temperature, top_k, top_p) for row in logits_BV.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_top_p_by_hand():
    """0.5 + 0.3 reach 0.8 exactly enough; the third token is cut off."""
    logits_BV = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    found = probabilities(logits_BV, Sampling(top_p=0.75))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.625, 0.0, 0.375]]))


def test_tokens_without_a_meaning_stay_impossible():
    logits_BV = torch.zeros(3, 6)
    logits_BV[:, 4:] = -torch.inf
    for sampling in (Sampling(), Sampling(2.0, 0.99, 5), Sampling(0)):
        drawn = torch.stack([draw_tokens(logits_BV, sampling, keys()[:3], s) for s in range(200)])
        assert drawn.max() < 4


@functools.cache
def epoch_keys(total):
    one_row = torch.ones(1, dtype=torch.long)
    return torch.cat([keys(one_row, Draw(0, epoch=epoch)) for epoch in range(total)])


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.6), Sampling(top_k=4), Sampling(top_p=0.8)]
)
@pytest.mark.parametrize("over", ["rows", "slots", "samples", "epochs"])
def test_frequencies_follow_the_distribution(sampling, over):
    """Whatever it is that goes on counting."""
    total = 4000
    logits_V = torch.tensor([0.3, -1.0, 1.2, 0.0, 2.0, -0.4, 0.9])
    logits_BV = logits_V.expand(total, -1)
    ones = torch.ones(total, dtype=torch.long)
    count_B = torch.arange(total)
    slot_B: torch.Tensor | int = 2
    if over == "rows":
        key_B = keys(count_B)
    elif over == "slots":
        key_B, slot_B = keys(ones), count_B
    elif over == "samples":
        key_B = keys(ones, Draw(0, sample=tuple(range(total))))
    else:
        key_B = epoch_keys(total)
    drawn = draw_tokens(logits_BV, sampling, key_B, slot_B)
    expected = total * probabilities(logits_BV[:1], sampling)[0]
    counts = drawn.bincount(minlength=7)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    # The 99.9 % points of chi-square for up to six degrees of freedom.
    limit = [10.8, 13.8, 16.3, 18.5, 20.5, 22.5][int(possible.sum()) - 2]
    assert chi_square(counts[possible], expected[possible]) < limit


def test_temperature_zero_is_greedy():
    logits_BV = torch.randn(7, 90)
    assert torch.equal(draw_tokens(logits_BV, Sampling(0), keys(), 0), logits_BV.argmax(-1))


def test_the_drawn_token_is_the_argmax_of_the_perturbed_scores():
    logits_BV = torch.randn(7, 90)
    scores_BV = perturb(logits_BV, Sampling(), keys(), 3)
    assert torch.equal(scores_BV.argmax(-1), draw_tokens(logits_BV, Sampling(), keys(), 3))
    expected = logits_BV + gumbel(keys(), 3, 90)
    torch.testing.assert_close(scores_BV, expected)


def test_the_logits_are_left_as_they_were():
    logits_BV = torch.randn(7, 90)
    before = logits_BV.clone()
    draw_tokens(logits_BV, Sampling(0.7, 0.9, 20), keys(), 0)
    assert torch.equal(logits_BV, before)


@pytest.mark.parametrize("looked_at", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.999])
def test_the_nucleus_does_not_depend_on_how_many_tokens_are_looked_at(
    monkeypatch, looked_at, top_p
):
    """Flat rows, whose nucleus is wide, stand beside peaked ones."""
    sizes_B1 = torch.tensor([0.01, 1.0, 5.0, 0.5])[:, None]
    logits_BV = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)) * sizes_B1
    expected = cut_away(logits_BV, Sampling(top_p=top_p))
    monkeypatch.setattr("llmdistill.decoding.keyed.NUCLEUS_TOKENS", looked_at)
    assert torch.equal(cut_away(logits_BV, Sampling(top_p=top_p)), expected)


def test_a_tie_at_the_edge_of_the_nucleus_keeps_all_that_are_equal():
    logits_BV = torch.tensor([[0.6, 0.2, 0.2, 1e-9]]).log()
    assert cut_away(logits_BV, Sampling(top_p=0.7)).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("top_p", [0.9, 0.99999, 0.9999999])
def test_top_p_keeps_nothing_that_top_k_left_out(top_p):
    """The mass of the likeliest may round to less than top_p."""
    logits_BV = 8 * torch.randn(2000, 500, generator=torch.Generator().manual_seed(0))
    cut_BV = cut_away(logits_BV, Sampling(temperature=0.2, top_k=5, top_p=top_p))
    assert int((~cut_BV).sum(1).max()) <= 5
    assert int((~cut_BV).sum(1).min()) >= 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_do_not_stop_the_sampler(bad):
    """The guard of the step does, and says where."""
    logits_BV = torch.randn(3, 400)
    logits_BV[1, 7] = bad
    sampling = Sampling(top_p=0.9)
    ids_B = draw_tokens(logits_BV, sampling, keys(torch.arange(3)), 0)
    fine_B = draw_tokens(logits_BV[::2], sampling, keys(torch.arange(3)[::2]), 0)
    assert torch.equal(ids_B[::2], fine_B)
