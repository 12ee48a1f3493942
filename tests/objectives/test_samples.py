"""Samples are pooled row by row, and a rank's share of a mean has its value and its gradient."""

from __future__ import annotations

import torch

from llmdistill.objectives.samples import POOLS, gather, pooled, share_of
from llmdistill.objectives.states import tokens_of_rows
from tests import toy


def test_pools_of_three_tokens_by_hand():
    states_ND = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    assert pooled(states_ND, [2, 1], POOLS["mean"]).tolist() == [[2.0, 3.0], [5.0, 0.0]]
    assert pooled(states_ND, [2, 1], POOLS["last"]).tolist() == [[3.0, 4.0], [5.0, 0.0]]


def test_no_row_gives_no_sample_but_keeps_the_graph():
    states_ND = torch.zeros(0, 2, requires_grad=True)
    found = pooled(states_ND, [], POOLS["mean"])
    assert found.shape == (0, 2)
    assert found.requires_grad


def test_rows_without_loss_have_no_tokens():
    sequences = toy.sequences().without_loss(torch.tensor([False, True, False, False, True]))
    kept = [0, 2, 3]
    assert tokens_of_rows(sequences, "predicted") == sequences.num_predicted[kept].tolist()
    lengths = sequences.attention_mask_BT.sum(1)
    assert tokens_of_rows(sequences, "all") == lengths[kept].tolist()


def test_a_share_counts_own_samples_and_has_the_gradient_of_all():
    mean = torch.tensor(3.0, requires_grad=True)
    share = share_of(mean * 2, own=2, everyone=5)
    assert share.item() == 12
    share.backward()
    assert mean.grad.item() == 10


def test_one_process_has_its_own_samples_only():
    own_BD = torch.rand(3, 2)
    assert gather(own_BD) is own_BD
