"""CRD, ICD and RRD: by hand, at their limits, and what a queue remembers."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from llmdistill.batch import Sequences
from llmdistill.objectives.contrastive import (
    CrdObjective,
    IcdObjective,
    RrdObjective,
    disagreement,
    info_nce,
    relational,
)
from llmdistill.objectives.queues import Queue
from llmdistill.objectives.samples import prompt_keys
from llmdistill.sampling import Writer
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support.objectives import loss, prepared
from tests.training.helpers import dataset, trainer


def units(number: int, seed: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(number, width, generator=generator).double(), dim=1)


def everything(number: int) -> torch.Tensor:
    return torch.ones(number, number, dtype=torch.bool)


def pack(prompts, responses) -> Sequences:
    return Sequences.pack(prompts, responses, range(len(prompts)), writer=Writer.DATA, pad_id=0)


@pytest.fixture
def pair():
    return toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())


# ---- the losses ----


def test_info_nce_by_hand():
    similarity = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    first, second = math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))
    found = info_nce(similarity, torch.arange(2), everything(2))
    assert float(found) == pytest.approx((first + second) / 2)


def test_disagreement_by_hand():
    similarity = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double()
    q, p = similarity.softmax(1), similarity.T.softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    assert float(disagreement(similarity, everything(2))) == pytest.approx(float(expected))


def test_a_symmetric_match_has_no_disagreement():
    similarity = units(5, 0) @ units(5, 1).T
    assert float(disagreement(similarity + similarity.T, everything(5))) == pytest.approx(0)
    assert float(disagreement(similarity, everything(5))) > 1e-3


def test_pairs_that_are_not_allowed_count_nowhere():
    """As if they were not there, and with a finite gradient."""
    similarity = (3 * units(4, 0) @ units(4, 1).T).requires_grad_()
    allowed = everything(4)
    allowed[0, 1] = allowed[1, 0] = False
    own = torch.arange(4)
    with torch.no_grad():
        left = similarity[0, [0, 2, 3]].log_softmax(0)[0]
        others = torch.stack(
            [
                similarity[1, [1, 2, 3]].log_softmax(0)[0],
                similarity[2].log_softmax(0)[2],
                similarity[3].log_softmax(0)[3],
            ]
        )
        expected = -(left + others.sum()) / 4
        assert float(info_nce(similarity, own, allowed)) == pytest.approx(float(expected))
    (info_nce(similarity, own, allowed) + disagreement(similarity, allowed)).backward()
    assert torch.isfinite(similarity.grad).all()
    assert similarity.grad[0, 1] == similarity.grad[1, 0] == 0


def test_the_same_similarities_and_temperatures_have_the_entropy_and_no_gradient():
    similarity = (units(4, 0) @ units(9, 1).T).requires_grad_()
    found = relational(similarity, similarity.detach(), 0.1, 0.1)
    p = (similarity.detach() / 0.1).softmax(1)
    assert float(found.detach()) == pytest.approx(float(-(p * p.log()).sum(1).mean()))
    found.backward()
    assert similarity.grad.abs().max() < 1e-12


def test_a_cold_teacher_is_info_nce_with_its_nearest_response():
    mine, other, kept = units(4, 0), units(4, 2), units(9, 1)
    student, teacher = mine @ kept.T, other @ kept.T
    found = relational(student, teacher, 0.1, 1e-5)
    nearest = teacher.argmax(1)
    expected = info_nce(student / 0.1, nearest, torch.ones(4, 9, dtype=torch.bool))
    assert float(found) == pytest.approx(float(expected))


# ---- prompts ----


def test_rows_with_one_prompt_have_one_key():
    """Whatever their responses and their padding."""
    some = pack([[5, 6], [5, 6], [6, 5], [5, 6, 7]], [[8], [9, 10, 11], [8], [8]])
    first, second, swapped, longer = prompt_keys(some).tolist()
    assert first == second
    assert len({first, swapped, longer}) == 3
    alone = prompt_keys(pack([[5, 6]], [[12, 13]])).tolist()
    assert alone == [first]
    assert len(prompt_keys(pack([[5], [6]], [[7], []]))) == 1  # a row without a response is none


@pytest.mark.parametrize("kind", [IcdObjective, CrdObjective])
def test_responses_to_one_prompt_are_no_negatives_of_each_other(pair, kind):
    """No gradient brings a response of the student away from the teacher's to the same prompt."""
    made = prepared(kind(), *pair)
    keys = prompt_keys(pack([[5, 6], [5, 6], [9], [11]], [[20], [21], [22], [23]]))
    mine, other = (torch.eye(128)[start : start + 4].requires_grad_() for start in (0, 4))
    made.contrast(0, mine, other, keys).backward()
    # The vectors are orthogonal, so the gradient has one column for each vector of the teacher.
    pull = mine.grad[:, 4:8]
    assert pull[0, 1] == pull[1, 0] == 0
    assert (pull.diagonal() < 0).all()
    assert (pull[2:, :2] > 0).all()


def test_the_positive_is_in_no_queue_of_negatives(pair):
    """CRD: an earlier vector of the same prompt is left out."""
    made = prepared(CrdObjective(queue_size=8), *pair)
    mine, other, keys = units(3, 0, 128).float(), units(3, 1, 128).float(), torch.arange(3)
    empty = made.contrast(0, mine, other, keys)
    made.queue.add([other], keys)
    for row in range(3):
        alone = made.contrast(0, mine[row:][:1], other[row:][:1], keys[row:][:1])
        queued = torch.cat([other[row:][:1], other[keys != row]])
        scores = mine[row] @ queued.T / made.temperature
        assert float(alone) == pytest.approx(float(-scores.log_softmax(0)[0]), rel=1e-5)
    assert float(made.contrast(0, mine, other, keys)) > float(empty)


# ---- ICD ----


def test_the_factor_starts_at_e_and_stays_below_ten(pair):
    made = prepared(IcdObjective(), *pair)
    mine, other, keys = units(4, 0, 128).float(), units(4, 1, 128).float(), torch.arange(4)

    def expected(scale):
        similarity = scale * mine @ other.T
        return info_nce(similarity, keys, everything(4)) + 0.5 * disagreement(
            similarity, everything(4)
        )

    for value, scale in ((1.0, math.e), (2.0, math.e**2), (5.0, 10.0)):
        made.log_scale.data.fill_(value)
        found = made.contrast(0, mine, other, keys)
        assert float(found.detach()) == pytest.approx(float(expected(scale)), rel=1e-5)


def test_a_perfect_match_has_almost_no_loss(pair):
    made = prepared(IcdObjective(), *pair)
    made.log_scale.data.fill_(5.0)
    vectors = torch.eye(128)[:8]
    assert float(made.contrast(0, vectors, vectors, torch.arange(8)).detach()) < 1e-3


@pytest.mark.parametrize("kind", [IcdObjective, CrdObjective, RrdObjective])
def test_one_row_has_nothing_to_contrast(pair, kind):
    made = prepared(kind(), *pair)
    found = loss(made, *pair, pack([[5, 6]], [[7, 8]])).total
    assert float(found.detach()) == 0
    found.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


def test_projectors_of_both_models_are_trained_but_the_one_that_is_fixed(pair):
    for kind, trains in ((IcdObjective, True), (CrdObjective, True), (RrdObjective, False)):
        made = prepared(kind(), *pair)
        loss(made, *pair, toy.sequences(6)).total.backward()
        assert made.student_projectors[0].weight.grad.abs().max() > 0
        other = made.teacher_projectors[0].weight
        assert (other.grad is not None and bool(other.grad.abs().max() > 0)) == trains


def test_a_batch_that_is_too_small_is_told_with_its_number(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="llmdistill"):
        trainer(tmp_path, objectives=[IcdObjective()], per_device_train_batch_size=4)
    assert "objective 'icd' contrasts the rows of a batch with each other, and a batch has 4" in (
        caplog.text
    )


# ---- the queue ----


def test_a_queue_keeps_the_newest_and_wraps():
    queue = Queue(5, 2, 3)
    assert len(queue) == 0
    assert queue.vectors_of(0)[0].shape == (0, 3)
    rows = torch.arange(24.0).view(8, 3)
    for part in (rows[:3], rows[3:4], rows[4:8]):
        queue.add([part, -part], (part[:, 0] / 3).long())
    vectors, keys = queue.vectors_of(0)
    assert torch.equal(vectors, rows[3:])
    assert keys.tolist() == [3, 4, 5, 6, 7]
    assert torch.equal(queue.vectors_of(1)[0], -rows[3:])
    assert torch.equal(queue.vectors_of(0, room=2)[0], rows[6:])
    queue.add([rows, rows], torch.arange(8))  # more than it holds
    assert torch.equal(queue.vectors_of(0)[0], rows[3:])
    assert not queue.vectors_of(0)[0].requires_grad


@pytest.mark.parametrize("kind", [CrdObjective, RrdObjective])
def test_a_held_out_loss_leaves_the_queue_as_it_is(pair, kind):
    made = prepared(kind(queue_size=16), *pair)
    loss(made, *pair, toy.sequences(6)).total.backward()
    assert len(made.queue) == 6
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        loss(made, *pair, toy.sequences(6, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("kind", [CrdObjective, RrdObjective])
def test_a_queue_is_resumed_bit_for_bit(tmp_path, kind):
    """R1: forgetting it would change the next losses."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rows": dataset(8)}
    runs = []
    for name, start in (("a", None), ("b", str(tmp_path / "a/checkpoint-2"))):
        made = trainer(tmp_path / name, objectives=[kind(queue_size=10)], **options)
        made.train(resume_from_checkpoint=start)
        runs.append(made.model.objectives[0].state_dict())
    assert int(runs[0]["queue.seen"]) == 16
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_rrd_puts_the_batch_into_its_queue_first(pair):
    made = prepared(RrdObjective(queue_size=4), *pair)
    mine, other = units(3, 0, 128).float(), units(3, 1, 128).float()
    old = units(4, 2, 128).float()
    made.queue.add([old], torch.arange(4))
    kept = torch.cat([other, old[3:]])  # the newest four
    expected = relational(mine @ kept.T, other @ kept.T, 0.1, 0.02)
    found = made.contrast(0, mine, other, torch.arange(3))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
