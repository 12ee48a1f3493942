"""What is shown of each position is what the models' own logits say."""

from __future__ import annotations

import pytest
import torch

from llmdistill.evaluation import agreement
from llmdistill.evaluation.agreement import judge, per_token
from llmdistill.evaluation.tokens import CHOICES, positions
from llmdistill.teachers.local import LocalTeacher
from tests import toy

V = toy.NUM_TOKENS


@pytest.mark.parametrize("rows", [1, 1000])  # positions in a block
def test_positions_are_those_of_both_models(monkeypatch, rows):
    monkeypatch.setattr(agreement, "block_rows", lambda *_: rows)
    tokenizer, student = toy.tokenizer(), toy.model()
    teacher = LocalTeacher(toy.teacher_model(), tokenizer)
    [judged] = judge(teacher, [toy.sequences(5)])
    found = positions(student, judged, tokenizer, V)
    responses = judged.sequences.responses()
    assert [len(row) for row in found] == [len(ids) for ids in responses]
    flat = [one for row in found for one in row]
    assert [one.kl for one in flat] == pytest.approx(per_token(student, judged, V)[:, 0].tolist())
    ids = judged.sequences.input_ids_BT[:1, : int(judged.sequences.attention_mask_BT[0].sum())]
    for model, name in ((student, "student"), (teacher.model, "teacher")):
        with torch.no_grad():
            logits = model(ids).logits[0, -len(responses[0]) - 1, :V]
        top = logits.double().softmax(-1).topk(CHOICES)
        texts, shares = zip(*getattr(found[0][0], name), strict=True)
        assert list(texts) == [tokenizer.decode([one]) for one in top.indices.tolist()]
        assert list(shares) == pytest.approx(top.values.tolist(), rel=1e-4)
