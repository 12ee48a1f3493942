"""Batches of prompts for writing: of similar length, and bounded by rows, tokens and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch

from llmdistill.models.footprint import cached_numbers
from llmdistill.models.heads import unwrap_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_PER_ROW = 2048  # of prompt and response: more than most rows have
# Rows that are written at once if nothing else bounds them.  More rows cost a CPU more time per
# token, and a GPU gains little from them.
ROWS_ON_CPU, ROWS_ON_GPU = 64, 256
MEMORY_SHARE = 0.5  # share of the free memory that a cache may take


def by_tokens(
    lengths: Sequence[int], new_tokens: int, rows: int, *, tokens: int | None = None
) -> Iterator[list[int]]:
    """Yield the places of these prompts in batches of similar length, the shortest first.

    A batch has at most `rows` rows, and at most `tokens` tokens with padding, of prompts and of the
    `new_tokens` after each; None is `rows` * TOKENS_PER_ROW.  A longer prompt is alone in its
    batch: otherwise all rows of its batch would be padded to its length.
    """
    most = rows * TOKENS_PER_ROW if tokens is None else tokens
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Lengths rise, so this prompt is the longest of its batch.
        too_many = (len(batch) + 1) * (lengths[place] + new_tokens) > most
        if batch and (len(batch) == rows or too_many):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def rows_at_once(device: torch.device) -> int:
    """Return the number of rows to write at once on a device, if memory allows."""
    return ROWS_ON_CPU if device.type == "cpu" else ROWS_ON_GPU


def tokens_that_fit(model: PreTrainedModel) -> int | None:
    """Return the number of tokens whose cache fits into the memory that is free now.

    Processes on one machine share its memory, so on a CPU each gets its part.  None is no limit,
    for a model without attention, whose state does not grow.
    """
    inner: Any = unwrap_adapters(model)
    if not hasattr(inner.config.get_text_config(), "num_attention_heads"):
        return None
    # A model that is spread over GPUs has a part of the cache on each but the first.
    devices = {parameter.device for parameter in inner.parameters() if not parameter.is_meta}
    free = min(map(_free_bytes, devices)) * max(len(devices) - 1, 1) * MEMORY_SHARE
    return max(int(free / (cached_numbers(inner) * inner.dtype.itemsize)), 1)


def _free_bytes(device: torch.device) -> float:
    """Return the free bytes of a device, for this process."""
    if device.type == "cuda":
        # What PyTorch has reserved and does not use counts as used there.
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + own)
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
