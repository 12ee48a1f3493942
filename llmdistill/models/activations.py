"""Measure modules of a model on a sample text: means over its tokens, a few rows at a time.

B = sequences, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.heads import split, takes_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 8  # rows in one forward pass, which bounds the memory


@torch.no_grad()
def mean_over_tokens(
    model: PreTrainedModel,
    parts: Sequence[nn.Module],
    measure: Callable[[tuple, dict, Any], Tensor],
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
) -> Tensor:
    """Return the mean of a measure over all tokens except padding: (number of parts, ...).

    `measure(args, kwargs, output)` gets the arguments and the output of the forward pass of a part,
    and returns (B, T, ...).  The result is in the order in which the parts run.
    """
    if not attention_mask_BT.any():
        raise ModelError(
            "the sample text is empty, so nothing can be measured on it. Give rows of text, or "
            "list the layers to keep."
        )
    sums: list[Tensor] = []
    for start in range(0, len(input_ids_BT), ROWS):
        ids_BT, mask_BT = (x[start : start + ROWS] for x in (input_ids_BT, attention_mask_BT))
        columns = mask_BT.any(0)  # columns that are padding in all of these rows are left out
        if not columns.any():
            continue
        found = _sums(model, parts, measure, ids_BT[:, columns], mask_BT[:, columns])
        sums = found if not sums else [a + b for a, b in zip(sums, found, strict=True)]
    return torch.stack(sums) / attention_mask_BT.sum()


def _sums(
    model: PreTrainedModel,
    parts: Sequence[nn.Module],
    measure: Callable[[tuple, dict, Any], Tensor],
    ids_BT: Tensor,
    mask_BT: Tensor,
) -> list[Tensor]:
    """Return the sum of the measure over the tokens of some rows, for each part."""
    real_BT = mask_BT.bool()
    found: list[Tensor] = []

    def record(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        found.append(measure(args, kwargs, output)[real_BT].sum(0))

    hooks = [part.register_forward_hook(record, with_kwargs=True) for part in parts]
    try:
        # Without the head: no part needs logits, and they would be the largest tensor.
        backbone, _ = split(model)
        # Counted without the padding, as in every other pass: some families learn positions.
        positions_BT = (mask_BT.long().cumsum(1) - 1).clamp_min(0)
        options = {"position_ids": positions_BT} if takes_positions(backbone) else {}
        backbone(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return found
