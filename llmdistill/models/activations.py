"""What a sample text shows of a model's parts: means over its tokens, a few rows at a time.

B = sequences, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.models.heads import split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 8


@torch.no_grad()
def mean_over_tokens(
    model: PreTrainedModel,
    parts: Sequence[nn.Module],
    measure: Callable[[tuple, dict, Any], Tensor],
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
) -> Tensor:
    """The mean over real tokens of `measure(args, kwargs, output) -> (B, T, ...)` at each part, in
    the order in which they run: (parts, ...).
    """
    sums: list[Tensor] = []
    for start in range(0, len(input_ids_BT), ROWS):
        ids_BT, mask_BT = (x[start : start + ROWS] for x in (input_ids_BT, attention_mask_BT))
        columns = mask_BT.any(0)
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
    real_BT = mask_BT.bool()
    found: list[Tensor] = []

    def record(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        found.append(measure(args, kwargs, output)[real_BT].sum(0))

    hooks = [part.register_forward_hook(record, with_kwargs=True) for part in parts]
    try:
        backbone, _ = split(model)
        backbone(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
