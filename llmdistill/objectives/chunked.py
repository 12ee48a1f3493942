"""From hidden states to a summed loss and its gradients, without N x V numbers in memory.

N = predicted positions, n = positions of one block, c = positions of one chunk, H = hidden size,
V = vocabulary, W = rows of the whole head, padding rows included.  The logits of a chunk of
positions fill a buffer that the next chunk uses again.  Inside a chunk, autograd of the plain
divergence runs on a few rows at a time, so that its intermediate results stay in the CPU's cache.
Its gradient then overwrites the logits that it came from.  The gradients of hidden states and head
are computed in the forward pass; the backward pass only scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmdistill.models.chunks import CHUNK_ROWS, block_rows, rows_of_chunk
from llmdistill.models.heads import Head

PositionLoss = Callable[[Tensor, slice], Tensor]

PRODUCT_NUMBERS = 2**22  # numbers of a product that is widened before it is added to a sum


def chunked_sum(
    student_NH: Tensor,
    student_head: Head,
    position_loss: PositionLoss,
    weight_N: Tensor,
    *,
    chunk_size: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Return sum_N weight * position_loss(logits), and the losses without weights: (), (N,).

    `position_loss(student_nV, rows)` returns the (n,) losses of the positions `rows` from their
    logits, which it must not keep.  A chunk has `chunk_size` positions, or fewer if the vocabulary
    is so large that its logits would take more than 64 MiB.  The sum can be differentiated once,
    with respect to the hidden states and the head's weight and bias.  The losses are detached.
    Products run in autocast's dtype or the weight's, and losses in float32 or wider.
    """
    device_type = student_NH.device.type
    product_dtype = student_head.weight_VH.dtype
    if torch.is_autocast_enabled(device_type):
        product_dtype = torch.get_autocast_dtype(device_type)
    # The gradient of a part of a tensor would be copied into one of the whole, which is as large as
    # the head once more.  So the whole weight is differentiated, and zeros are left at its end.
    whole = student_head.whole or student_head
    weight_WH, bias_W = whole.weight_VH, whole.bias_V
    # `needs_input_grad` is True for a parameter even when gradients are off: without these calls,
    # every evaluation would compute the gradient of the head.
    if not torch.is_grad_enabled():
        student_NH, weight_WH = student_NH.detach(), weight_WH.detach()
        bias_W = None if bias_W is None else bias_W.detach()
    chunk_size = rows_of_chunk(chunk_size, student_head)
    with torch.autocast(device_type, enabled=False):
        total, per_position_N = _ChunkedSum.apply(
            student_NH,
            weight_WH,
            bias_W,
            student_head,
            position_loss,
            weight_N,
            chunk_size,
            product_dtype,
        )
    return total, per_position_N


class _ChunkedSum(torch.autograd.Function):
    """The sum of `chunked_sum`, whose gradients are ready when its forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_WH: Tensor,
        bias_W: Tensor | None,
        head: Head,
        position_loss: PositionLoss,
        weight_N: Tensor,
        chunk_size: int,
        product_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_grad = wants_hidden or wants_weight or wants_bias
        used = slice(head.num_tokens)
        inputs_NH, matrix_VH = hidden_NH.to(product_dtype), weight_WH[used].to(product_dtype)
        grad_NH = torch.zeros_like(inputs_NH) if wants_hidden else None
        grad_WH = torch.zeros_like(weight_WH) if wants_weight else None
        grad_W = torch.zeros_like(bias_W) if wants_bias and bias_W is not None else None
        wide = torch.promote_types(product_dtype, torch.float32)
        losses_N = torch.empty(len(hidden_NH), dtype=wide, device=hidden_NH.device)
        buffer_cV = inputs_NH.new_empty(min(chunk_size, len(hidden_NH)), head.num_tokens)
        for start in range(0, len(hidden_NH), chunk_size):
            chunk = slice(start, min(start + chunk_size, len(hidden_NH)))
            logits_cV = buffer_cV[: chunk.stop - start]
            torch.mm(inputs_NH[chunk], matrix_VH.t(), out=logits_cV)
            parts = (logits_cV, head, position_loss, weight_N)
            _fill_losses(losses_N, chunk, *parts, wants_grad=wants_grad)
            # From here on `logits_cV` holds the gradient of the products, not the logits.
            if grad_NH is not None:
                torch.mm(logits_cV, matrix_VH, out=grad_NH[chunk])
            if grad_WH is not None:
                _add_product(grad_WH[used], logits_cV.t(), inputs_NH[chunk])
            if grad_W is not None:
                grad_W[used] += logits_cV.sum(0).to(grad_W.dtype)
        ctx.grads = (grad_NH, grad_WH, grad_W)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weight_N.to(wide)).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "chunked_sum can be differentiated only once: its gradients are already used. "
                "Run the forward pass again."
            )
        grads, ctx.grads = ctx.grads, None
        # In place: the gradient of a head is as large as the head, and nothing else refers to it.
        scaled = [None if grad is None else grad.mul_(grad_total.to(grad.dtype)) for grad in grads]
        return (*scaled, None, None, None, None, None)


def _fill_losses(
    losses_N: Tensor,
    chunk: slice,
    logits_cV: Tensor,
    head: Head,
    position_loss: PositionLoss,
    weight_N: Tensor,
    *,
    wants_grad: bool,
) -> None:
    """Write the losses of a chunk into `losses_N`.

    With gradients, the gradient of the weighted losses overwrites `logits_cV`.
    """
    wide = torch.promote_types(logits_cV.dtype, torch.float32)
    step = block_rows(len(logits_cV), logits_cV.shape[1], logits_cV.device)
    for offset in range(0, len(logits_cV), step):
        block_nV = logits_cV[offset : offset + step]
        rows = slice(chunk.start + offset, chunk.start + offset + len(block_nV))
        products_nV = block_nV.detach().to(wide).requires_grad_(wants_grad)
        with torch.set_grad_enabled(wants_grad):
            loss_n = position_loss(head.finish(products_nV), rows)
            weighted = (loss_n * weight_N[rows].to(loss_n.dtype)).sum()
        # Small tensors that outlive a block would lie between its large ones on the heap, which
        # would then grow with each block.
        losses_N[rows] = loss_n.detach()
        if wants_grad:
            block_nV.copy_(torch.autograd.grad(weighted, products_nV)[0])


def _add_product(sum_VH: Tensor, left_Vc: Tensor, right_cH: Tensor) -> None:
    """Add left @ right to the sum, in the sum's dtype."""
    if sum_VH.dtype == left_Vc.dtype:
        sum_VH.addmm_(left_Vc, right_cH)
        return
    # A few rows at a time, because the product as a whole is as large as the head.
    step = max(1, PRODUCT_NUMBERS // sum_VH.shape[1])
    for start in range(0, len(sum_VH), step):
        sum_VH[start : start + step] += left_Vc[start : start + step] @ right_cH
