"""Attention that takes the lengths of sequences, as flash attention does, in plain torch.

B = sequences, D = heads, S = tokens of all sequences, T = tokens, E = size of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

NAME = "by_lengths"


@contextlib.contextmanager
def by_lengths(*dtypes: torch.dtype) -> Iterator[list[tuple[int, ...]]]:
    """Register the function under NAME; yield the shape (B, T) of the queries of each call.

    It refuses other dtypes than `dtypes`, if they are given.
    """
    calls: list[tuple[int, ...]] = []

    def attend(module, query_BDTE, key, value, attention_mask, **options) -> tuple[Tensor, None]:
        states = (query_BDTE, key, value)
        if torch.is_autocast_enabled("cpu"):  # the rotation makes them float32 again
            states = tuple(x.to(torch.get_autocast_dtype("cpu")) for x in states)
        if dtypes and states[0].dtype not in dtypes:
            raise TypeError(f"got {states[0].dtype}")
        calls.append((len(query_BDTE), query_BDTE.shape[2]))
        ends = options.get("cu_seq_lens_q")
        if ends is None:
            return _each_row(module, states, attention_mask, options), None
        parts = [
            _one(module, [x[:, :, a:b] for x in states], options)
            for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
            if a < b
        ]
        return torch.cat(parts, 1), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    try:
        yield calls
    finally:
        del AttentionInterface._global_mapping[NAME]
        del AttentionMaskInterface._global_mapping[NAME]


def _each_row(module, states, mask_BT: Tensor | None, options: dict) -> Tensor:
    """Attend within each row of a padded batch; padding gets zeros, as with flash attention."""
    if mask_BT is None:
        return _one(module, states, options)
    found = []
    for row, mask_T in enumerate(mask_BT):
        own = _one(module, [x[row : row + 1, :, mask_T] for x in states], options)
        padded = own.new_zeros(1, len(mask_T), *own.shape[2:])
        padded[:, mask_T] = own
        found.append(padded)
    return torch.cat(found)


def _one(module, states, options: dict) -> Tensor:
    """Attend causally, within the window if there is one."""
    window, columns = options.get("sliding_window"), torch.arange(states[1].shape[2])
    mask = None
    if window is not None:
        distance = columns[:, None] - columns
        mask = ((distance >= 0) & (distance < window))[None, None, -states[0].shape[2] :]
    return sdpa_attention_forward(module, *states, mask, **options)[0]
