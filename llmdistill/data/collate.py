"""Encoded rows as a data set that a trainer can draw from, and as batches of prompts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from llmdistill.batch import Prompts
from llmdistill.data.validate import Row, RowCounts, Rules, encode, stream
from llmdistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptDataset(Dataset):
    """Encoded rows, with what became of the rows that they were made from."""

    def __init__(self, rows: Sequence[Row], counts: RowCounts | None = None) -> None:
        self.rows = list(rows)
        self.counts = counts or RowCounts(read=len(self.rows), kept=len(self.rows))

    @classmethod
    def encode(
        cls,
        rows: Iterable[tuple[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        rules: Rules | None = None,
    ) -> PromptDataset:
        """From (place, row) pairs."""
        return cls(*encode(rows, tokenizer, rules))

    @classmethod
    def of(
        cls,
        rows: EncodedRows | Iterable[dict[str, Any]] | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> EncodedRows | None:
        """What a user hands over: rows in any form, an encoded data set, or nothing."""
        if rows is None or isinstance(rows, PromptDataset | PromptStream):
            return rows
        return cls.encode(((f"row {i}", row) for i, row in enumerate(rows)), tokenizer)

    @classmethod
    def join(
        cls,
        parts: Sequence[tuple[PromptDataset, float]],
        *,
        seed: int,
        without: frozenset[int] = frozenset(),
    ) -> PromptDataset:
        """Several data sets as one, each row as often as its part's weight says, but for the row
        ids `without`.

        A weight of 2.5 is every row twice and half of them once more, the same ones in every run.
        Copies are rows of their own: a model writes each of them another answer.
        """
        rows: list[Row] = []
        copies: list[Row] = []
        total = RowCounts()
        for part, weight in parts:
            for row in part.rows:
                placed = replace(row, row_id=total.examples + row.row_id)
                if placed.row_id in without:
                    continue
                drawn = random.Random(f"{seed}/{placed.row_id}").random() < weight % 1
                times = int(weight) + drawn
                rows += [placed] * (times > 0)
                copies += [placed] * (times - 1)
            total += part.counts
        numbered = (replace(row, row_id=total.examples + i) for i, row in enumerate(copies))
        return cls([*rows, *numbered], total)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def head(self, number: int) -> list[Row]:
        return self.rows[:number]

    def hold_back(self, number: int) -> tuple[PromptDataset, PromptDataset]:
        """All rows but `number` evenly spaced ones, and those: the same split in every run."""
        held = {(2 * i + 1) * len(self) // (2 * number) for i in range(number)}
        kept = [row for place, row in enumerate(self.rows) if place not in held]
        return PromptDataset(kept, self.counts), PromptDataset([self.rows[i] for i in sorted(held)])


class ByLength(Sampler[int]):
    """Rows in a random order in which neighbours are of similar length: `window` of them make a
    step.  The order depends on seed and epoch alone.
    """

    def __init__(self, rows: PromptDataset, window: int, *, seed: int) -> None:
        self.lengths = [len(row.prompt_ids) + len(row.response_ids or ()) for row in rows.rows]
        self.window, self.seed, self.epoch = window, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.window, generator=draw))


class PromptStream(IterableDataset):
    """Rows encoded while they are read, in their order, anew in each epoch; none is held.

    A malformed row stops the run when it comes, unless the rules skip it.
    """

    def __init__(
        self,
        rows: Callable[[], Iterable[tuple[str, Any]]],
        tokenizer: PreTrainedTokenizerBase,
        rules: Rules,
    ) -> None:
        self.read, self.tokenizer, self.rules = rows, tokenizer, rules
        self.counts = RowCounts()

    def __iter__(self) -> Iterator[Row]:
        self.counts = RowCounts()
        on_bad = _skip if self.rules.skip_bad else _stop
        yield from stream(self.read(), self.tokenizer, self.rules, self.counts, on_bad)

    def head(self, number: int) -> list[Row]:
        return list(itertools.islice(iter(self), number))


EncodedRows = PromptDataset | PromptStream  # what a trainer takes


def _skip(_error: DataError) -> None:
    """It is counted already."""


def _stop(error: DataError) -> None:
    raise error


def sample_text(rows: EncodedRows, number: int) -> Prompts:
    """The first rows as plain text, responses included: what a model is carved by."""
    texts = [[*row.prompt_ids, *(row.response_ids or [])] for row in rows.head(number)]
    return Prompts.pack(texts, range(len(texts)), pad_id=0)


def collate(rows: Sequence[Row]) -> Prompts:
    """Rows as one batch of prompts; with responses where every row has one."""
    responses = [row.response_ids for row in rows]
    return Prompts.pack(
        [row.prompt_ids for row in rows],
        [row.row_id for row in rows],
        pad_id=0,
        responses=None if any(r is None for r in responses) else [r or [] for r in responses],
    )
