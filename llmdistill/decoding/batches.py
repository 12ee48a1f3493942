"""Batches of prompts that are bounded by tokens, not by rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

TOKENS_PER_ROW = 2048  # of prompt and response: more than most rows have


def by_tokens(lengths: Sequence[int], new_tokens: int, rows: int) -> Iterator[list[int]]:
    """Yield the places of these prompts in batches, in their order.

    A batch has at most `rows` rows and `rows` * TOKENS_PER_ROW tokens with padding, of prompts and
    of the `new_tokens` after each.  A longer prompt is alone in its batch: otherwise all rows of
    its batch would be padded to its length.
    """
    batch: list[int] = []
    longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        too_many = (len(batch) + 1) * (longest + new_tokens) > rows * TOKENS_PER_ROW
        if batch and (len(batch) == rows or too_many):
            yield batch
            batch, longest = [], length
        batch.append(place)
    if batch:
        yield batch
