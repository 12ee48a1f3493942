"""Packed layers give the same numbers, and are put back whatever happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmdistill.decoding import packed as module
from llmdistill.decoding.packed import packed
from tests import toy
from tests.support.models import family


def qwen(**options):
    """Biases at q, k and v, none elsewhere; the biases are not zero."""
    made = family("Qwen2", vocab_size=toy.NUM_TOKENS, initializer_range=0.2, **options)
    for layer in made.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(linear.bias)
    return made


MODELS = {
    "tied": toy.model,
    "untied": lambda: toy.model(tie_word_embeddings=False),
    "biased": qwen,
    "biased and tied": lambda: qwen(tie_word_embeddings=True),
}


@pytest.fixture
def ids_BT():
    return torch.randint(3, 250, (3, 7), generator=torch.Generator().manual_seed(1))


def forwards(model):
    return [m for m in model.modules() if "forward" in m.__dict__]


@pytest.fixture
def calls(monkeypatch):
    """The rows that packed layers multiplied."""
    seen, real = [], module._linear
    module._packs(torch.float32)  # its own trial does not count

    def linear(x, **options):
        seen.append(x.shape)
        return real(x, **options)

    monkeypatch.setattr(module, "_linear", linear)
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@torch.no_grad()
def test_the_logits_are_the_same(name, batch_size, ids_BT, calls):
    model = MODELS[name]()
    expected = model(ids_BT, use_cache=False).logits
    assert expected.std() > 0.1
    with packed(model, batch_size):
        found = model(ids_BT, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if module._packs(torch.float32):
        assert len(calls) == sum(isinstance(m, nn.Linear) for m in model.modules())


@pytest.mark.parametrize("name", ["tied", "biased"])
@torch.no_grad()
def test_the_layers_are_put_back(name, ids_BT):
    model = MODELS[name]()
    before = model(ids_BT, use_cache=False).logits
    with packed(model, 3):
        assert forwards(model) or not module._packs(torch.float32)
    assert not forwards(model)
    assert torch.equal(model(ids_BT, use_cache=False).logits, before)


def test_the_layers_are_put_back_after_an_error():
    model = toy.model()
    with pytest.raises(RuntimeError, match="stop"), packed(model, 3):
        raise RuntimeError("stop")
    assert not forwards(model)


def test_the_layers_are_put_back_after_an_error_while_packing(monkeypatch):
    real, count = module._pack, []

    def pack(weight, batch_size):
        count.append(1)
        if len(count) == 4:
            raise MemoryError
        return real(weight, batch_size)

    model = toy.model()
    assert module._packs(torch.float32)  # asked once before `_pack` is replaced
    monkeypatch.setattr(module, "_pack", pack)
    with pytest.raises(MemoryError), packed(model, 3):
        pytest.fail("never reached")
    assert not forwards(model)


@torch.no_grad()
def test_weights_are_read_anew_each_time(ids_BT):
    """A packed copy of an earlier step would write with an old student."""
    model = toy.model(tie_word_embeddings=False)
    with packed(model, 3):
        model(ids_BT, use_cache=False)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    expected = model(ids_BT, use_cache=False).logits
    with packed(model, 3):
        torch.testing.assert_close(
            model(ids_BT, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_tied_layers_are_packed_once(monkeypatch):
    shared = nn.Linear(8, 8)
    twin = nn.Linear(8, 8)
    twin.weight = shared.weight
    model, x = nn.Sequential(shared, twin), torch.randn(3, 8)
    expected = model(x)
    seen, real = [], module._pack

    def pack(weight, batch_size):
        seen.append(weight)
        return real(weight, batch_size)

    assert module._packs(torch.float32)
    monkeypatch.setattr(module, "_pack", pack)
    with packed(model, 3):
        torch.testing.assert_close(model(x), expected)  # one weight, two biases
    assert len(seen) == 1


@torch.no_grad()
def test_a_transposed_weight_on_the_same_memory_is_not_taken_for_the_other():
    """Memory alone is no name for a weight: a part of it, or its transpose, starts there too."""
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = nn.Parameter(first.weight.detach().t())
    model, x = nn.Sequential(first, second), torch.randn(3, 8)
    expected = model(x)
    with packed(model, 3):
        torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_bfloat16_is_close(ids_BT):
    model = qwen().bfloat16()
    expected = model(ids_BT, use_cache=False).logits.float()
    with packed(model, 3):
        found = model(ids_BT, use_cache=False).logits.float()
    torch.testing.assert_close(found, expected, atol=0.15, rtol=0.05)


@torch.no_grad()
def test_autocast_decides_the_dtype(ids_BT):
    model = qwen()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids_BT, use_cache=False).logits
        with packed(model, 3):
            found = model(ids_BT, use_cache=False).logits
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), atol=0.15, rtol=0.05)


@torch.no_grad()
def test_float64_is_left_as_it_is(ids_BT):
    model = qwen().double()
    expected = model(ids_BT, use_cache=False).logits
    with packed(model, 3):
        assert not forwards(model)
        assert torch.equal(model(ids_BT, use_cache=False).logits, expected)


@torch.no_grad()
def test_where_packing_does_not_work_the_layers_stay(monkeypatch, ids_BT):
    monkeypatch.setattr(module, "_packs", lambda dtype: False)
    model = toy.model()
    with packed(model, 3):
        assert not forwards(model)


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_a_missing_operator_is_found_out(monkeypatch, error):
    def pack(weight, batch_size):
        raise error

    monkeypatch.setattr(module, "_pack", pack)
    assert not module._packs.__wrapped__(torch.float32)


def test_wrong_numbers_are_found_out(monkeypatch):
    monkeypatch.setattr(module, "_pack", lambda weight, batch_size: 1.1 * weight)
    monkeypatch.setattr(module, "_linear", lambda x, *, weight, bias, dtype: x @ weight.t())
    assert not module._packs.__wrapped__(torch.float32)


def test_subclasses_of_linear_are_left_alone():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4))
    with packed(model, 2):
        assert "forward" not in model[0].__dict__


def test_packed_layers_take_part_in_no_other_precision(monkeypatch):
    """Packed for float32; under autocast the products are bfloat16's, as without packing."""
    model, ids = toy.model(), torch.tensor([[5, 6, 7]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids).logits
    with torch.no_grad(), packed(model, 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)


def test_packing_twice_is_packing_once():
    model, ids = toy.model(), torch.tensor([[5, 6, 7]])
    with torch.no_grad(), packed(model, 1):
        forward = model.lm_head.__dict__["forward"]
        with packed(model, 1):
            assert model.lm_head.__dict__["forward"] is forward
        assert model.lm_head.__dict__["forward"] is forward
        model(ids)
    assert "forward" not in model.lm_head.__dict__
