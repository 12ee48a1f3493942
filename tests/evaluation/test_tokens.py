"""What is shown of each position is what the models' own logits say."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from llmdistill.batch import Sequences
from llmdistill.evaluation import agreement
from llmdistill.evaluation.agreement import judge, per_token
from llmdistill.evaluation.tokens import CHOICES, _word, positions
from llmdistill.sampling import Writer
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


def test_a_token_keeps_its_space_behind_another_one():
    """Tokenizers made by SentencePiece write no space at the start of a text."""
    backend = Tokenizer(WordLevel({"▁the": 0, "▁cat": 1}, unk_token="▁the"))
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert _word(tokenizer, [], 1) == "cat"
    assert _word(tokenizer, [0], 1) == " cat"
    sequences = Sequences.pack([[0]], [[0, 1]], [0], writer=Writer.TEACHER, pad_id=0)
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    [judged] = judge(teacher, [sequences])
    [row] = positions(toy.model(), judged, tokenizer, V)
    assert [one.text for one in row] == ["the", " cat"]
