"""Limits for the number of logits in memory, and a head's logits computed within them.

N = positions, n = positions of one block, H = hidden size, V = vocabulary.

N x V logits are never in memory at once: with N = 2,048 and V = 151,936, they would take 1.2 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmdistill.models.heads import Head

CHUNK_ROWS = 256  # most positions in a chunk
CHUNK_NUMBERS = 2**24  # most logits in a chunk: 64 MiB in float32
# Logits that a CPU works on at a time: 1.6 MB in float32, which fit its cache.
BLOCK_NUMBERS = 400_000


def rows_of_chunk(chunk_size: int, head: Head) -> int:
    """Return the number of positions in a chunk: `chunk_size`, or fewer for a large vocabulary."""
    return max(1, min(chunk_size, CHUNK_NUMBERS // head.num_tokens))


def block_rows(chunk_size: int, num_tokens: int, device: torch.device) -> int:
    """Return the number of positions to work on at a time: a whole chunk, or less on a CPU."""
    if device.type != "cpu":
        return chunk_size
    return max(1, min(chunk_size, BLOCK_NUMBERS // num_tokens))


class HeadLogits:
    """The logits of a fixed head over fixed hidden states, computed a chunk at a time.

    `logits[rows]` is (n, V).  It is overwritten as soon as a slice of another chunk is computed.
    Gradients do not flow through it.
    """

    def __init__(self, hidden_NH: Tensor, head: Head, chunk_size: int = CHUNK_ROWS) -> None:
        self.hidden_NH = hidden_NH.detach().to(head.weight_VH.device, head.weight_VH.dtype)
        self.head = head
        self.chunk_size = rows_of_chunk(chunk_size, head)
        self._buffer_cV: Tensor | None = None
        self._made: range = range(0)

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Tensor:
        if rows.start not in self._made or rows.stop > self._made.stop:
            chunk = slice(rows.start, max(rows.stop, rows.start + self.chunk_size))
            hidden_cH = self.hidden_NH[chunk]
            # One buffer is reused for all chunks, so only one chunk of logits is in memory.
            if self._buffer_cV is None or len(self._buffer_cV) < len(hidden_cH):
                self._buffer_cV = hidden_cH.new_empty(len(hidden_cH), self.head.num_tokens)
            torch.mm(hidden_cH, self.head.weight_VH.t(), out=self._buffer_cV[: len(hidden_cH)])
            self._made = range(rows.start, rows.start + len(hidden_cH))
        assert self._buffer_cV is not None
        place = rows.start - self._made.start
        return self.head.finish(self._buffer_cV[place : place + rows.stop - rows.start])
