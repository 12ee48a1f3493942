"""Writing a batch in parts of similar length, so that its cache fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from llmdistill.batch import Prompts, Sequences
from llmdistill.decoding.batches import by_tokens, rows_at_once
from llmdistill.sampling import Draw


def in_parts(
    prompts: Prompts,
    draw: Draw,
    write: Callable[[Prompts, Draw], Sequences],
    *,
    new_tokens: int,
    batch_size: int | Literal["auto"],
    writers: tuple[Any, ...],
) -> Sequences:
    """Return what `write` makes of the prompts, in their order.

    It is called once if the batch is small enough.  A response does not depend on its part, because
    draws are keyed by the row.

    Args:
        prompts: The prompts of all rows.
        draw: The key of all randomness; `write` gets that of its part.
        write: Writes one part.
        new_tokens: The longest response, in tokens.
        batch_size: The most rows of a part; "auto" is what the device writes well.
        writers: The models, each of which keeps a cache.  Their `room` is the number of tokens of
            it that fit into memory, if they have one.
    """
    rooms = [one.room() for one in writers if hasattr(one, "room")]
    places = list(
        by_tokens(
            prompts.attention_mask_BP.sum(1).tolist(),
            new_tokens,
            rows_of(batch_size, writers[0]),
            tokens=min((room for room in rooms if room is not None), default=None),
        )
    )
    if len(places) <= 1:
        return write(prompts, draw)
    written = [write(prompts.select(some, pad_id=0), _part(draw, some)) for some in places]
    order = torch.tensor([place for some in places for place in some]).argsort()
    return Sequences.join(written).select(order)


def rows_of(batch_size: int | Literal["auto"], writer: Any) -> int:
    """Return the most rows of a batch that a model writes at once."""
    if batch_size != "auto":
        return batch_size
    return rows_at_once(getattr(writer, "device", torch.device("cpu")))


def _part(draw: Draw, places: list[int]) -> Draw:
    if isinstance(draw.sample, int):
        return draw
    return replace(draw, sample=tuple(draw.sample[place] for place in places))
