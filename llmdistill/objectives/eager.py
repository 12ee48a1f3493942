"""A sum whose gradients are ready when its forward pass ends, one term at a time.

What autograd would save for the backward pass of all terms is never in memory together.
`chunked.py` does the same for logits, where it also saves the product with the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Term = Callable[[int, Tensor], Tensor]  # (number of the term, input) -> ()


def eager_sum(term: Term, number: int, inputs: Tensor) -> Tensor:
    """Return the sum of `term(i, inputs)` for i from 0 to `number` - 1: ().

    It can be differentiated with respect to `inputs`.  The terms must not use other tensors that
    need a gradient.
    """
    if not torch.is_grad_enabled():
        inputs = inputs.detach()  # else `needs_input_grad` would be True in an evaluation
    return _EagerSum.apply(inputs, term, number)


class _EagerSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, term: Term, number: int) -> Tensor:
        (wants_grad,) = ctx.needs_input_grad[:1]
        total = inputs.new_zeros(())
        grad = torch.zeros_like(inputs) if wants_grad else None
        for i in range(number):
            own = inputs.detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                value = term(i, own)
            total += value.detach()
            if grad is not None:
                grad += torch.autograd.grad(value, own)[0]
        ctx.grad = grad
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        return (None if ctx.grad is None else ctx.grad * grad_total), None, None
