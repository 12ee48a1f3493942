"""What travels together stays together: a judgement follows its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmdistill.batch import Dense, Prompts, Sequences, TeacherSignal
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


def test_prompts_are_selected_as_if_they_were_packed_anew():
    rows = [[3, 0, 0], [7], [], [5, 6]]
    responses = [[1], [2, 3], [], [4]]
    whole = Prompts.pack(rows, [4, 5, 6, 7], pad_id=9, responses=responses)
    for places in ([1], [3, 1], [2], [], [0, 0, 2], [3, 2, 1, 0]):
        found = whole.select(places, pad_id=1)
        expected = Prompts.pack(
            [rows[place] for place in places], [4 + place for place in places], pad_id=1,
            responses=[responses[place] for place in places],
        )  # fmt: skip
        assert found.ids() == expected.ids()
        assert found.responses == expected.responses
        for name in ("input_ids_BP", "attention_mask_BP", "row_ids_B"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_sequences_are_joined_with_their_signals():
    parts = [judged(), judged()]
    both = Sequences.join(parts)
    assert both.responses() == [ids for part in parts for ids in part.responses()]
    assert len(both.signal.distribution) == sum(len(one.signal.distribution) for one in parts)
    again = both.select(torch.arange(len(parts[0]), len(both)))
    assert torch.equal(again.signal.distribution.hidden_NH, parts[1].signal.distribution.hidden_NH)
    assert Sequences.join([parts[0], replace(parts[1], signal=None)]).signal is None
