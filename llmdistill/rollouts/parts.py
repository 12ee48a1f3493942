"""Writing a batch in parts of similar length, so that its cache fits into memory.

B = rows, P = prompt tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from llmdistill.batch import Prompts, Sequences
from llmdistill.decoding.batches import by_tokens, rows_at_once, tokens_that_fit
from llmdistill.models.limits import advice_on_memory
from llmdistill.models.placement import at_hand
from llmdistill.models.sharding import has_sharded_weights, largest
from llmdistill.sampling import Draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        writers: The models, each of which keeps a cache.
    """
    with contextlib.ExitStack() as stack:
        for model in filter(None, map(_model_of, writers)):
            stack.enter_context(at_hand(model))  # once for all parts, and before memory is measured
        places = _places(prompts, new_tokens, batch_size, writers)
        number = most_of_all(len(places), *writers)
        if number <= 1:
            with advice_on_memory(functools.partial(_advice, prompts)):
                return write(prompts, draw)
        written = []
        idle = [[0]] * (number - len(places))  # parts that other ranks have and this one has not
        for some in [*places, *idle]:
            part = prompts.select(some, pad_id=0)
            with advice_on_memory(functools.partial(_advice, part)):
                written.append(write(part, _part(draw, some)))
    order = torch.tensor([place for some in places for place in some]).argsort()
    return Sequences.join(written[: len(places)]).select(order)


def _places(
    prompts: Prompts, new_tokens: int, batch_size: int | Literal["auto"], writers: tuple[Any, ...]
) -> list[list[int]]:
    """Return the places of the prompts of each part."""
    rooms = [tokens for tokens in map(room, writers) if tokens is not None]
    lengths = prompts.attention_mask_BP.sum(1).tolist()
    rows = most_rows(batch_size, writers[0])
    return list(by_tokens(lengths, new_tokens, rows, tokens=min(rooms, default=None)))


def most_rows(batch_size: int | Literal["auto"], writer: Any) -> int:
    """Return the most rows of a batch that a teacher or the student writes at once."""
    if batch_size != "auto":
        return batch_size
    model = _model_of(writer)
    return rows_at_once(torch.device("cpu") if model is None else model.device)


def room(writer: Any) -> int | None:
    """Return the number of tokens whose cache fits into the free memory of a writer.

    None is no limit, for a writer without a model here.
    """
    model = _model_of(writer)
    return None if model is None else tokens_that_fit(model)


def most_of_all(number: int, *writers: Any) -> int:
    """Return the largest number of any rank if weights of a writer are sharded, or this one.

    Ranks that gather weights from each other must write the same number of batches.
    """
    sharded = any(has_sharded_weights(_model_of(one)) for one in writers)
    return largest(number) if sharded else number


def _advice(prompts: Prompts) -> str:
    """Return what to do if the memory does not suffice to write a part."""
    rows, width = prompts.input_ids_BP.shape
    return (
        f"This was while responses to {rows} prompts of up to {width} tokens were written "
        f"together. Set batch_size of the rollout to {max(rows // 2, 1)} or less, which changes "
        "nothing else, or lower its max_new_tokens."
    )


def _model_of(writer: Any) -> PreTrainedModel | None:
    """Return the model of a local teacher, or the student in `Distillation`."""
    found = getattr(writer, "student", getattr(writer, "model", None))
    return found if isinstance(found, nn.Module) else None


def _part(draw: Draw, places: list[int]) -> Draw:
    if isinstance(draw.sample, int):
        return draw
    return replace(draw, sample=tuple(draw.sample[place] for place in places))
