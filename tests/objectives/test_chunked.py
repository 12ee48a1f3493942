"""N0, N3: chunked equals dense, in value and in gradient, and never makes N x V numbers."""

from __future__ import annotations

import pytest
import torch

from llmdistill.models.chunks import HeadLogits
from llmdistill.models.heads import Head
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import DIVERGENCES
from tests.support.objectives import LargestTensor, NewTensors

N, H, V = 37, 12, 50


def parts(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    hidden, weight, bias = normal(N, H), normal(V, H), normal(V)
    teacher_hidden, teacher_weight = normal(N, 2 * H), normal(V, 2 * H)
    weights = torch.rand(N, generator=draw, dtype=torch.float64).to(dtype)
    weights[::5] = 0
    return hidden, weight, bias, teacher_hidden, teacher_weight, weights


def run(head, chunk_size, divergence="forward_kl", dtype=torch.float64):
    hidden, weight, bias, teacher_hidden, teacher_weight, weights = parts(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    made = head(weight, bias)
    teacher_head = Head(teacher_weight)
    if chunk_size is None:
        losses = DIVERGENCES[divergence](made(hidden), teacher_head(teacher_hidden))
        total = (losses * weights).sum()
    else:
        teacher = HeadLogits(teacher_hidden, teacher_head, chunk_size)
        total, losses = chunked_sum(
            hidden,
            made,
            lambda student, rows: DIVERGENCES[divergence](student, teacher[rows]),
            weights,
            chunk_size=chunk_size,
        )
    (total * 3).backward()
    return total.detach(), losses.detach(), [leaf.grad for leaf in leaves]


HEADS = {
    "plain": lambda weight, bias: Head(weight),
    "bias": lambda weight, bias: Head(weight, bias),
    "scaled": lambda weight, bias: Head(weight, bias, scale=0.3),
    "softcap": lambda weight, bias: Head(weight, bias, scale=2.0, softcap=4.0),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 7, 256])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_dense_with_weights_that_differ(head, chunk_size, divergence):
    expected = run(HEADS[head], None, divergence)
    found = run(HEADS[head], chunk_size, divergence)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-9, atol=1e-9)
    for ours, dense in zip(found[2], expected[2], strict=True):
        assert (ours is None) == (dense is None)
        if ours is not None:
            torch.testing.assert_close(ours, dense, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 7, 256])
def test_equals_dense_to_1e_5_in_float32(chunk_size):
    exact = run(HEADS["bias"], None)
    found = run(HEADS["bias"], chunk_size, dtype=torch.float32)
    for ours, dense in zip(found[2], exact[2], strict=True):
        torch.testing.assert_close(ours.double(), dense, rtol=1e-4, atol=1e-5)


def test_bfloat16_products_and_float32_loss():
    """The loss is the float32 softmax of the same bfloat16 logits, to 1e-4 relative."""
    hidden, weight, _, teacher_hidden, teacher_weight, weights = parts(torch.bfloat16)
    teacher = HeadLogits(teacher_hidden, Head(teacher_weight), 7)
    divergence = DIVERGENCES["jsd"]
    total, losses = chunked_sum(
        hidden, Head(weight), lambda s, rows: divergence(s, teacher[rows]), weights, chunk_size=7
    )
    exact = divergence((hidden @ weight.T).float(), (teacher_hidden @ teacher_weight.T).float())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(total, (exact * weights.float()).sum(), rtol=1e-4, atol=0)


def test_autocast_decides_the_dtype_of_products_only():
    hidden, weight, _, teacher_hidden, teacher_weight, weights = parts(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    teacher = HeadLogits(teacher_hidden, Head(teacher_weight), 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, losses = chunked_sum(
            hidden, Head(weight), lambda s, rows: DIVERGENCES["jsd"](s, teacher[rows]), weights
        )
    total.backward()
    products = (hidden.bfloat16() @ weight.bfloat16().T).float()
    exact = DIVERGENCES["jsd"](products, teacher_hidden @ teacher_weight.T)
    torch.testing.assert_close(losses, exact.detach(), rtol=1e-4, atol=1e-6)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_no_position_at_all_gives_a_zero_with_a_graph():
    weight = torch.randn(V, H, requires_grad=True)
    hidden = torch.zeros(0, H, requires_grad=True)
    total, losses = chunked_sum(hidden, Head(weight), lambda s, rows: s.sum(-1), torch.zeros(0))
    total.backward()
    assert total.item() == 0
    assert losses.shape == (0,)
    assert weight.grad.abs().max() == 0


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, _, _, weights = parts()
    hidden.requires_grad_()
    total, _ = chunked_sum(hidden, Head(weight), lambda s, rows: s.logsumexp(-1), weights)
    total.backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_without_gradients_nothing_is_kept():
    hidden, weight, _, _, _, weights = parts()
    weight.requires_grad_()
    with torch.no_grad():
        total, losses = chunked_sum(hidden, Head(weight), lambda s, rows: s.logsumexp(-1), weights)
    assert not total.requires_grad
    torch.testing.assert_close(total, (losses * weights).sum())


def test_a_second_backward_is_refused():
    hidden, weight, _, _, _, weights = parts()
    hidden.requires_grad_()
    total, _ = chunked_sum(hidden, Head(weight), lambda s, rows: s.logsumexp(-1), weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        total.backward()


def test_never_makes_n_x_v_numbers():
    with LargestTensor() as watch:
        run(HEADS["plain"], 7, "jsd")
    assert watch.largest < N * V


def test_the_watch_sees_a_dense_loss():
    with LargestTensor() as watch:
        run(HEADS["plain"], None, "jsd")
    assert watch.largest >= N * V


def test_without_gradients_none_is_made(monkeypatch):
    """A head's weight is a parameter in every evaluation, too."""
    monkeypatch.setattr(torch.autograd, "grad", None)
    hidden, weight, _, teacher_hidden, teacher_weight, weights = parts()
    teacher = HeadLogits(teacher_hidden, Head(teacher_weight), 7)
    with torch.no_grad():
        total, _ = chunked_sum(
            hidden,
            Head(torch.nn.Parameter(weight)),
            lambda student, rows: DIVERGENCES["forward_kl"](student, teacher[rows]),
            weights,
        )
    assert not total.requires_grad


def test_a_large_vocabulary_makes_small_chunks(monkeypatch):
    """A chunk's logits are bounded, and the value does not change."""
    plain = run(lambda weight, bias: Head(weight), 37)
    monkeypatch.setattr("llmdistill.models.chunks.CHUNK_NUMBERS", 5 * V + 3)
    mode = LargestTensor()
    with mode:
        small = run(lambda weight, bias: Head(weight), 37)
    assert mode.largest <= max(5 * V, V * 2 * H)  # five rows of logits, or the teacher's head
    for ours, theirs in zip(small, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- a head without its padding rows ----


def narrowed(chunk_size, *, autocast=False, dtype=torch.float64):
    """The gradients of states, weight and bias of a head that is cut to its first 41 rows."""
    hidden, weight, bias, _, _, weights = parts(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    head = Head(weight, bias).narrow(45).narrow(41)
    if chunk_size is None:
        total = (head(hidden).logsumexp(-1) * weights).sum()
        total.backward()
        return [leaf.grad for leaf in leaves]
    with NewTensors(41 * H) as made, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, _ = chunked_sum(
            hidden, head, lambda s, rows: s.logsumexp(-1), weights, chunk_size=chunk_size
        )
        total.backward()
    return [leaf.grad for leaf in leaves], made.names


@pytest.mark.parametrize("chunk_size", [1, 7, 256])
def test_the_gradient_of_a_narrowed_head_is_that_of_autograd(chunk_size):
    found, _ = narrowed(chunk_size)
    for ours, dense in zip(found, narrowed(None), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-10)
    assert found[1][41:].abs().max() == found[2][41:].abs().max() == 0


def test_the_gradient_of_a_narrowed_head_is_made_once():
    _, names = narrowed(7)
    assert names == ["aten::zeros_like"]


def test_under_autocast_the_weight_is_copied_and_no_product_is_as_large(monkeypatch):
    monkeypatch.setattr("llmdistill.objectives.chunked.PRODUCT_NUMBERS", 9 * H)
    found, names = narrowed(7, autocast=True, dtype=torch.float32)
    assert names == ["aten::_to_copy", "aten::zeros_like"]
    monkeypatch.setattr("llmdistill.objectives.chunked.PRODUCT_NUMBERS", V * H)
    whole, names = narrowed(7, autocast=True, dtype=torch.float32)
    assert "aten::mm" in names
    assert torch.equal(found[1], whole[1])
