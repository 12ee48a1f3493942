"""Blocks that visit the device for their own pass give the same numbers and stay out of it else."""

from __future__ import annotations

import pytest
import torch

from llmdistill.errors import ModelError
from llmdistill.models.load import load_model
from llmdistill.models.offload import offload_layers
from llmdistill.protocols import Need
from llmdistill.teachers.local import LocalTeacher
from tests import toy


@torch.no_grad()
def test_an_offloaded_teacher_judges_the_same():
    sequences = toy.sequences()
    needs = frozenset({Need.DISTRIBUTION})
    expected = LocalTeacher(toy.teacher_model(), toy.tokenizer()).judge(sequences, needs)
    model = offload_layers(toy.teacher_model(), torch.device("cpu"))
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert not model.model.embed_tokens.weight.is_meta
    teacher = LocalTeacher(model, toy.tokenizer())
    found = teacher.judge(sequences, needs)
    assert torch.equal(found.distribution.hidden_NH, expected.distribution.hidden_NH)
    assert all(p.is_meta for p in model.model.layers.parameters())


@torch.no_grad()
def test_an_offloaded_teacher_writes_the_same():
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = toy.teacher_model().generate(ids, **options)
    model = offload_layers(toy.teacher_model(), torch.device("cpu"))
    assert torch.equal(model.generate(ids, **options), expected)


def test_on_the_cpu_there_is_nothing_to_offload(pair):
    with pytest.raises(ModelError, match="the device is the CPU"):
        load_model(pair[0], device="cpu", offload=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu_the_blocks_stay_in_the_cpus_memory(pair):
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    expected = load_model(pair[0], dtype="float32", device="cuda")(ids).logits
    model = load_model(pair[0], dtype="float32", device="cuda", offload=True)
    assert model.model.embed_tokens.weight.is_cuda
    assert not any(p.is_cuda for p in model.model.layers.parameters())
    torch.testing.assert_close(model(ids).logits, expected)
