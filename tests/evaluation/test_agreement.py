"""Agreement equals a dense computation from the models' own logits, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from llmdistill.evaluation import agreement as module
from llmdistill.evaluation.agreement import Agreement, agreement, judge
from llmdistill.sampling import Writer
from llmdistill.teachers.local import LocalTeacher
from tests import toy

V = toy.NUM_TOKENS


@pytest.fixture
def teacher():
    return LocalTeacher(toy.teacher_model(), toy.tokenizer())


@pytest.fixture
def batches():
    return [
        toy.sequences(5),
        toy.sequences(3, seed=1, writer=Writer.STUDENT),
        toy.sequences(7, seed=2),
    ]


@torch.no_grad()
def dense(student, teacher_model, batches):
    """Plain loops over single rows, without padding, masks or blocks."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        for row, responses in enumerate(batch.responses()):
            length = int(batch.attention_mask_BT[row].sum())
            ids = batch.input_ids_BT[row : row + 1, :length]
            # The logits at t judge the token at t + 1; padding rows are cut before the softmax.
            p, q = (
                model(ids).logits[0, length - len(responses) - 1 : -1, :V].double().softmax(-1)
                for model in (teacher_model, student)
            )
            sums[0] += (p * (p / q).log()).sum()
            sums[1] += (p.argmax(-1) == q.argmax(-1)).sum()
            sums[2] += torch.minimum(p, q).sum()
            count += len(responses)
    return (sums / count).tolist()


def similar_student():
    """The teacher with a little noise, so that the shares lie well inside (0, 1)."""
    student = toy.teacher_model(rows=V + 5)
    source = toy.teacher_model().state_dict()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(source[name][: len(parameter)])
            parameter.add_(0.02 * torch.randn_like(parameter))
    return student


@pytest.mark.parametrize("block", [1, 3, 8, 1000])
def test_agreement_is_the_dense_computation(teacher, batches, block, monkeypatch):
    monkeypatch.setattr(module, "block_rows", lambda *args: block)
    monkeypatch.setattr("llmdistill.models.chunks.CHUNK_NUMBERS", 11 * V)
    student = similar_student()
    found = agreement(student, judge(teacher, batches), V)
    expected = dense(student, teacher.model, batches)
    assert [found.forward_kl, found.top1, found.acceptance] == pytest.approx(expected, rel=1e-4)
    assert 0.1 < found.top1 < 0.95
    assert 0.1 < found.acceptance < 0.95
    assert found.forward_kl > 0.01


def test_the_divergence_runs_from_the_teacher(teacher, batches):
    """KL is not symmetric: the other way round is another number."""
    student = toy.model()
    forward = agreement(student, judge(teacher, batches), V).forward_kl
    backward = dense(teacher.model, student, batches)[0]
    assert abs(forward - backward) > 0.01 * forward


def test_a_model_agrees_with_itself(teacher, batches):
    found = agreement(teacher.model, judge(teacher, batches), V)
    assert found.forward_kl == pytest.approx(0.0, abs=1e-6)
    assert found.top1 == 1.0
    assert found.acceptance == pytest.approx(1.0, abs=1e-5)


def test_the_mean_is_over_tokens_and_not_over_batches(teacher, batches):
    """Batches of different sizes: a mean of means would be another number."""
    student = similar_student()
    whole = agreement(student, judge(teacher, batches), V)
    parts = [agreement(student, judge(teacher, [batch]), V) for batch in batches]
    counts = [int(batch.num_predicted.sum()) for batch in batches]
    weighted = sum(p.forward_kl * n for p, n in zip(parts, counts, strict=True)) / sum(counts)
    assert whole.forward_kl == pytest.approx(weighted, rel=1e-6)
    assert abs(weighted - sum(p.forward_kl for p in parts) / 3) > 1e-4


def test_padding_columns_change_nothing(teacher, batches):
    student = similar_student()
    whole = agreement(student, judge(teacher, batches[:1]), V)
    parts = [batches[0].select(torch.tensor([row])) for row in range(5)]
    alone = agreement(student, judge(teacher, parts), V)
    assert whole.forward_kl == pytest.approx(alone.forward_kl, rel=1e-5)
    assert whole.acceptance == pytest.approx(alone.acceptance, rel=1e-5)


def test_padding_rows_of_the_heads_are_cut_off(teacher, batches):
    student = toy.model(tie_word_embeddings=False)
    before = agreement(student, judge(teacher, batches), V)
    with torch.no_grad():
        student.lm_head.weight[V:] *= 100
    assert agreement(student, judge(teacher, batches), V) == before


def test_of_nothing_is_zero_and_finite(teacher, batches):
    empty = batches[0].without_loss(torch.ones(5, dtype=torch.bool))
    for nothing in ([], [empty]):
        assert agreement(toy.model(), judge(teacher, nothing), V) == Agreement(0.0, 0.0, 0.0)
    both = agreement(toy.model(), judge(teacher, [empty, batches[1]]), V)
    assert both == agreement(toy.model(), judge(teacher, batches[1:2]), V)


def test_disjoint_distributions_accept_nothing(batches):
    """Teacher and student each certain of a token of their own."""
    models = [toy.model(tie_word_embeddings=False, layers=1) for _ in range(2)]
    for model, token in zip(models, (7, 9), strict=True):
        with torch.no_grad():
            model.model.norm.weight.zero_()
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
            model.lm_head.bias[token] = 30.0
    found = agreement(models[0], judge(LocalTeacher(models[1], toy.tokenizer()), batches[:1]), V)
    assert found.top1 == 0.0
    assert found.acceptance < 1e-8
    assert found.forward_kl == pytest.approx(30.0, rel=1e-4)
    assert math.isfinite(found.forward_kl)
