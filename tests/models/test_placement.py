"""A model whose layers are not on its device gives the numbers of a whole one."""

from __future__ import annotations

import pytest
import torch

from llmdistill.batch import Prompts
from llmdistill.errors import ModelError
from llmdistill.models import placement
from llmdistill.models.digest import digest_of, keep_digest
from llmdistill.models.layers import decoder_layers
from llmdistill.models.load import load_model
from llmdistill.models.placement import (
    PLACEMENTS,
    at_hand,
    is_whole,
    offload_layers,
    park_layers,
    spread_layers,
)
from llmdistill.protocols import Need, Progress
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.kept import identity
from llmdistill.sampling import Draw, Sampling
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.step import Distillation
from tests import toy
from tests.support.teachers import seam_objectives
from tests.training.helpers import INTERLEAVED

CPU = torch.device("cpu")
INNER = Need.HIDDEN.after(1)
PLACES = {
    "offloaded": lambda model: offload_layers(model, CPU),
    "parked": lambda model: park_layers(model, CPU),
    "spread": lambda model: spread_layers(model, CPU, [CPU, CPU]),
}
each = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def prompts(number: int) -> Prompts:
    return Prompts.pack([list(range(5, 8 + n)) for n in range(number)], range(number), pad_id=0)


def teacher(place=None) -> LocalTeacher:
    model = toy.teacher_model()
    return LocalTeacher(model if place is None else place(model), toy.tokenizer())


@each
def test_a_teacher_judges_the_same(place):
    sequences, needs = toy.sequences(), frozenset({Need.DISTRIBUTION, INNER})
    expected, found = (one.judge(sequences, needs) for one in (teacher(), teacher(place)))
    assert torch.equal(found.distribution.hidden_NH, expected.distribution.hidden_NH)
    assert torch.equal(found.distribution.head.weight_VH, expected.distribution.head.weight_VH)
    assert torch.equal(found.states[INNER], expected.states[INNER])


@each
def test_a_teacher_writes_the_same(place):
    some = prompts(4)
    options = {"max_new_tokens": 6, "draw": Draw(0)}
    expected, found = (
        one.write(some, Sampling(), **options).responses() for one in (teacher(), teacher(place))
    )
    assert found == expected


@each
def test_both_models_write_the_same(place):
    written = []
    for judge in (teacher(), teacher(place)):
        student = Distillation(toy.model(), judge, seam_objectives(), toy.tokenizer())
        rollout = InterleavedRollout(**INTERLEAVED)
        made = rollout.write(prompts(4), student, judge, Progress(step=0, epoch=0, seed=3))
        written.append(made.responses())
    assert written[0] == written[1]


def test_offloaded_layers_have_no_memory_between_passes():
    model = teacher(PLACES["offloaded"]).model
    model(torch.tensor([[5, 6, 7]]))
    assert all(p.is_meta for p in decoder_layers(model).parameters())
    assert not model.model.embed_tokens.weight.is_meta
    assert not is_whole(model)


def test_each_use_of_a_parked_teacher_brings_its_layers(monkeypatch):
    """The layers that are parked are spoilt here, and only their copies are right."""
    expected, found = teacher(), teacher(PLACES["parked"])
    right = {id(p): p.data.clone() for p in decoder_layers(found.model).parameters()}
    by_place = {p.data_ptr(): right[id(p)] for p in decoder_layers(found.model).parameters()}
    for parameter in decoder_layers(found.model).parameters():
        parameter.data.fill_(torch.nan)
    monkeypatch.setattr(
        placement, "_copied", lambda tensor, _: by_place.get(tensor.data_ptr(), tensor).clone()
    )
    needs = frozenset({Need.DISTRIBUTION})
    judged = [one.judge(toy.sequences(), needs).distribution.hidden_NH for one in (expected, found)]
    assert torch.equal(*judged)
    options = {"max_new_tokens": 6, "draw": Draw(0)}
    written = [one.write(prompts(4), Sampling(), **options) for one in (expected, found)]
    assert written[0].responses() == written[1].responses()


def test_another_place_is_the_same_teacher(pair):
    whole = identity(LocalTeacher.load(pair[0], dtype="float32", device="cpu"))
    model = toy.teacher_model()
    keep_digest(model)
    moved = LocalTeacher(offload_layers(model, CPU), toy.tokenizer())
    assert digest_of(moved.model) == digest_of(toy.teacher_model())
    other = toy.teacher_model()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.001)
    assert digest_of(other) != digest_of(moved.model)
    assert whole == identity(LocalTeacher.load(pair[0], dtype="float32", placement="sharded"))


def test_parked_layers_are_on_the_device_while_they_are_in_use(monkeypatch):
    """There is one device here, so copies show where the weights are."""
    monkeypatch.setattr(placement, "_copied", lambda tensor, _: tensor.clone())
    model = park_layers(toy.teacher_model(), CPU)

    def places():
        return {p.data_ptr() for p in decoder_layers(model).parameters()}

    kept, head = places(), model.lm_head.weight.data_ptr()
    with at_hand(model):
        there = places()
        with at_hand(model):
            assert places() == there
        assert places() == there, "the outer use goes on"
        assert model.lm_head.weight.data_ptr() == head
    assert not there & kept
    assert places() == kept
    with pytest.raises(RuntimeError, match="in between"), at_hand(model):
        raise RuntimeError("in between")
    assert places() == kept
    assert not is_whole(model)


def test_a_session_keeps_parked_layers_at_hand():
    parked = teacher(PLACES["parked"])
    moved = []
    kept = parked.model.placed.at_hand

    def at_hand_once():
        moved.append(not parked.model.placed.in_use)
        return kept()

    parked.model.placed.at_hand = at_hand_once
    with parked.session(prompts(2)) as opened:
        opened.extend(torch.tensor([[5], [6]]))
        opened.extend(torch.tensor([[7], [8]]))
    assert moved.count(True) == 1
    assert len(moved) >= 3


@pytest.mark.parametrize("name", sorted(PLACEMENTS.keys() - {"whole", "sharded"}))
def test_on_the_cpu_there_is_no_other_place(pair, name):
    with pytest.raises(ModelError, match="the device is the CPU"):
        load_model(pair[0], device="cpu", placement=name)


def test_wrong_placements_are_refused(pair):
    with pytest.raises(ModelError, match="placement 'half': it is not one of whole, sharded"):
        load_model(pair[0], device="cpu", placement="half")
    with pytest.raises(ModelError, match="it is quantised"):
        load_model(pair[0], device="cpu", placement="sharded", quantization="torchao_int8")
    with pytest.raises(ModelError, match="there is only one GPU"):
        spread_layers(toy.teacher_model(), CPU, [])


def test_one_process_has_all_shards(pair):
    model = load_model(pair[0], device="cpu", placement="sharded", dtype="float32")
    assert is_whole(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["offloaded", "parked"])
@torch.no_grad()
def test_on_a_gpu_the_layers_stay_in_the_cpus_memory(pair, name):
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    expected = load_model(pair[0], dtype="float32", device="cuda")(ids).logits
    model = load_model(pair[0], dtype="float32", device="cuda", placement=name)
    assert model.model.embed_tokens.weight.is_cuda
    assert not any(p.is_cuda for p in model.model.layers.parameters())
    with at_hand(model):
        torch.testing.assert_close(model(ids).logits, expected)
    assert not any(p.is_cuda for p in model.model.layers.parameters())
