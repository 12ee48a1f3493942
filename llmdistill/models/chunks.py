"""How many logits are held at a time, and a head's logits served within that bound.

N = positions, n = positions of one block, H = hidden size, V = vocabulary.  N x V numbers are never
held: at N = 2,048 and V = 151,936 they would take 1.2 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmdistill.models.heads import Head

CHUNK_ROWS = 256  # positions in a chunk at the most
CHUNK_NUMBERS = 2**24  # logits in a chunk at the most: 64 MiB in float32
BLOCK_NUMBERS = 400_000  # logits on which autograd runs at a time, on a CPU: its cache's size


def rows_of_chunk(chunk_size: int, head: Head) -> int:
    """Positions in a chunk: fewer than asked for if the vocabulary is large."""
    return max(1, min(chunk_size, CHUNK_NUMBERS // head.num_tokens))


def block_rows(chunk_size: int, num_tokens: int, device: torch.device) -> int:
    """Positions to work on at a time: what a CPU's cache holds, or a GPU's whole chunk."""
    if device.type != "cpu":
        return chunk_size
    return max(1, min(chunk_size, BLOCK_NUMBERS // num_tokens))


class HeadLogits:
    """The logits of a fixed head over fixed hidden states, made a chunk at a time.

    `logits[rows]` is (n, V) and valid until a slice of another chunk is asked for.
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
            if self._buffer_cV is None or len(self._buffer_cV) < len(hidden_cH):
                self._buffer_cV = hidden_cH.new_empty(len(hidden_cH), self.head.num_tokens)
            torch.mm(hidden_cH, self.head.weight_VH.t(), out=self._buffer_cV[: len(hidden_cH)])
            self._made = range(rows.start, rows.start + len(hidden_cH))
        assert self._buffer_cV is not None
        place = rows.start - self._made.start
        return self.head.finish(self._buffer_cV[place : place + rows.stop - rows.start])
