"""Under autocast, a model that writes casts each weight once, whether it is frozen or not."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmdistill.batch import Prompts
from llmdistill.decoding.casts import cast_once
from llmdistill.decoding.sample import sample
from llmdistill.decoding.session import ready_to_write, session
from llmdistill.models.adapters import add_adapter
from llmdistill.sampling import Draw, Sampling, Writer
from tests import toy

NUM_TOKENS = 9
PROMPTS = [[5, 6, 7], [8, 9]]


class Casts(TorchDispatchMode):
    """Counts the numbers of matrices that are copied to bfloat16; states are much smaller."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_cast = function is torch.ops.aten._to_copy.default
        if is_cast and kwargs.get("dtype") == torch.bfloat16:
            self.numbers += args[0].numel() * (args[0].dim() == 2 and args[0].numel() > 900)
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    """Only CPUs pack layers, and a packed layer holds a copy already."""
    monkeypatch.setattr(
        "llmdistill.decoding.session.packed", lambda *args: contextlib.nullcontext()
    )


def student(*, lora: bool):
    model = toy.model(hidden=64)
    if not lora:
        return model
    adapted = add_adapter(model, rank=4, alpha=8, targets="all-linear", dropout=0.0, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros, which would hide the adapter
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def write(model):
    prompts = Prompts.pack(PROMPTS, [0, 1], pad_id=0)
    options = {"max_new_tokens": NUM_TOKENS, "draw": Draw(0), "writer": Writer.STUDENT}
    options |= {"stops": False, "keep_states": True}
    return sample(model, toy.tokenizer(), prompts, Sampling(), **options)


def step(model):
    prompts = Prompts.pack(PROMPTS, [0, 1], pad_id=0)
    with session(model, toy.tokenizer(), prompts) as opened:
        for column in range(NUM_TOKENS):
            opened.logits(opened.extend(torch.full((2, 1), 10 + column)))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("run", [write, step])
def test_weights_are_cast_once(lora, run):
    model = student(lora=lora)
    size = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), Casts() as casts:
        run(model)
    assert 0.8 * size < casts.numbers < 1.1 * size


def test_tokens_and_states_are_those_without_the_context(monkeypatch):
    model = student(lora=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = write(model)
    monkeypatch.setattr(
        "llmdistill.decoding.session.cast_once", lambda model: contextlib.nullcontext()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = write(model)
    states_NH = expected.signal.distribution.hidden_NH
    assert found.responses() == expected.responses()
    assert torch.equal(found.signal.distribution.hidden_NH, states_NH)
    assert not torch.equal(write(model).signal.distribution.hidden_NH, states_NH)  # float32


def test_weights_and_gradients_are_as_before():
    """Also if the loss is computed in the autocast context in which the model wrote."""
    model, ids = student(lora=True), torch.tensor(PROMPTS[:1])
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    grads = []
    for writes in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if writes:
                write(model)
            model(ids).logits.float().logsumexp(-1).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1] == ("lora" in name)
        first, second = (some[name] for some in grads)
        assert (first is None) == (second is None) == ("lora" not in name)
        assert first is None or torch.equal(first, second)


def test_weights_are_frozen_again_after_an_error():
    model = student(lora=True)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast, pytest.raises(RuntimeError, match="stop"), ready_to_write(model, 2):
        raise RuntimeError("stop")
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


def test_without_autocast_nothing_is_changed():
    model = student(lora=True)
    with cast_once(model):
        assert not all(p.requires_grad for p in model.parameters())
