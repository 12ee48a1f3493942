"""What travels together stays together: a judgement follows its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmdistill.batch import Dense, Sequences, TeacherSignal
from llmdistill.models.heads import Head
from tests import toy


def judged(number: int = 6) -> Sequences:
    """Each predicted token's state holds the row and the column that it stands in."""
    sequences = toy.sequences(number)
    places_N2 = sequences.response_mask_BT.nonzero().float()
    return replace(sequences, signal=TeacherSignal(Dense(places_N2, Head(torch.zeros(3, 2)))))


def places(sequences: Sequences, rows) -> list[list[float]]:
    """What the states should hold, when these were the rows."""
    return [
        [row, column]
        for row, mask in zip(rows, sequences.response_mask_BT, strict=True)
        for column in mask.nonzero()[:, 0].tolist()
    ]


@pytest.mark.parametrize("rows", [[0], [5, 2, 3], [1, 1], [4, 3, 2, 1, 0, 5], []])
def test_a_judgement_follows_its_rows(rows):
    chosen = judged().select(torch.tensor(rows, dtype=torch.long))
    assert chosen.signal.distribution.hidden_NH.tolist() == places(chosen, rows)
    assert len(chosen.signal.distribution.hidden_NH) == int(chosen.num_predicted.sum())


def test_rows_without_loss_have_no_judgement():
    silent = torch.tensor([False, True, False, False, True, False])
    left = judged().without_loss(silent)
    assert left.signal.distribution.hidden_NH.tolist() == places(left, range(6))
    assert left.num_predicted[silent].sum() == 0
    assert len(left.targets_N) == len(left.signal.distribution.hidden_NH)
