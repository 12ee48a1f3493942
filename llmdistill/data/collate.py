"""Encoded rows as a dataset that a trainer can draw from, and as batches of prompts.

N = rows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from llmdistill.batch import Prompts
from llmdistill.data.content import dataset_content
from llmdistill.data.encoding import encode_source
from llmdistill.data.table import Row, Rows
from llmdistill.data.validate import Encoder, RowCounts, Rules
from llmdistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_ROWS = 64  # rows of a stream that stand for all of them


class PromptDataset(Dataset):
    """Encoded rows in an Arrow table, with the counts of the rows that they were made from."""

    def __init__(self, rows: Rows | Iterable[Row], counts: RowCounts | None = None) -> None:
        self.rows = Rows.of(rows)
        self.counts = counts or RowCounts(read=len(self.rows), kept=len(self.rows))

    @classmethod
    def encode(
        cls,
        rows: Iterable[tuple[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        rules: Rules | None = None,
        *,
        content: str | None = None,
    ) -> PromptDataset:
        """Encode (place, row) pairs.  Raises DataError as `validate.encode` does.

        If `content` tells what the rows are, they are read from the cache of an earlier call, or
        written to it.
        """
        encoded = encode_source(rows, content, tokenizer, rules or Rules())
        return cls(Rows(encoded.table), encoded.counts)

    @classmethod
    def of(
        cls,
        rows: EncodedRows | Iterable[dict[str, Any]] | None,
        tokenizer: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase | None = None,
    ) -> EncodedRows | None:
        """Return rows that a user passes in as a dataset; encoded rows and None are returned as is.

        `rows` can be dicts in any form of `formats.py`; those of a `datasets.Dataset` are cached.
        Raises DataError if one is malformed, and VocabularyError if the tokenizer of the teacher
        renders one differently.
        """
        if rows is None or isinstance(rows, PromptDataset | PromptStream):
            return rows
        if isinstance(rows, Mapping):
            raise DataError(
                f"the dataset is a mapping with the keys {', '.join(map(str, rows))}. Pass one "
                "dataset: a list of rows, each of which is a dict."
            )
        rules = Rules(others=() if teacher is None else (teacher,))
        numbered = ((f"row {i}", row) for i, row in enumerate(rows))
        return cls.encode(numbered, tokenizer, rules, content=dataset_content(rows))

    @classmethod
    def join(
        cls,
        parts: Sequence[tuple[PromptDataset, float]],
        *,
        seed: int,
        without: np.ndarray | None = None,
    ) -> PromptDataset:
        """Join several datasets into one, with as many copies of each row as its part's weight.

        A weight of 2.5 takes every row twice and half of them once more, the same ones in every run
        with this seed.  Each copy has a separate row id, so a model writes another answer to it.
        Rows whose id is in `without` are left out.
        """
        total = RowCounts()
        placed, times = [], []
        for part, weight in parts:
            # The ids of a part count its dropped examples too, so the offset must as well.
            placed.append(part.rows.renumbered(part.rows.row_ids_N + total.examples))
            times.append(_times(placed[-1].row_ids_N, weight, seed))
            total += part.counts
        rows, times_N = Rows.join(placed), np.concatenate(times)
        if without is not None:
            times_N[np.isin(rows.row_ids_N, without)] = 0
        places_N = np.arange(len(rows))
        copies = rows.take(np.repeat(places_N, np.maximum(times_N - 1, 0)))
        # First copies keep their ids whatever the weights are; further copies are numbered after
        # all of them.
        numbered = copies.renumbered(total.examples + np.arange(len(copies)))
        first = rows.take(times_N > 0)
        return cls(Rows.join([first, numbered]) if len(copies) else first, total)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def head(self, number: int) -> list[Row]:
        """Return the first rows."""
        return self.rows[:number]

    def hold_back(self, number: int) -> tuple[PromptDataset, PromptDataset]:
        """Split off at least `number` rows, of evenly spaced questions; return the others first.

        Rows with the same prompt stay together, because a held-out question must not be trained
        with another answer.  The split is the same in every run.  `number` must be smaller than the
        number of rows.
        """
        _, first, group_N, sizes = np.unique(
            self.rows.questions_N, return_index=True, return_inverse=True, return_counts=True
        )
        order = first.argsort()  # questions in the order of the rows
        # A question with very many rows would hold out most of the data.
        largest = max(number, int(sizes.min()) if len(sizes) else 0)
        groups = order[sizes[order] <= largest]
        if (few := int(sizes[groups].sum())) < number:
            raise DataError(
                f"data.hold_back: only {few} rows belong to questions with at most {number} rows, "
                "and questions are held back whole. Set a smaller number, or use data.eval."
            )
        held_N = np.isin(group_N, _evenly(groups, sizes, number))
        kept = PromptDataset(self.rows.take(~held_N), self.counts)
        return kept, PromptDataset(self.rows.take(held_N))


def _times(row_ids_N: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Return how often each row is taken."""
    whole = np.full(len(row_ids_N), int(weight))
    if weight % 1 == 0:
        return whole
    draws = (random.Random(f"{seed}/{row}").random() for row in row_ids_N.tolist())
    return whole + np.fromiter((draw < weight % 1 for draw in draws), int, len(row_ids_N))


def _evenly(groups: np.ndarray, sizes: np.ndarray, number: int) -> np.ndarray:
    """Return evenly spaced groups that have at least `number` rows together."""
    if not number:
        return groups[:0]
    for count in range(-(-number // int(sizes[groups].max())), len(groups) + 1):
        # The middle of each of `count` equal parts.
        chosen = groups[(2 * np.arange(count) + 1) * len(groups) // (2 * count)]
        if sizes[chosen].sum() >= number:
            return chosen
    return groups


class ByLength(Sampler[int]):
    """A random order of rows in which neighbours have similar lengths.

    `window` is the number of rows that are grouped, those of one accumulation window.  The order
    depends only on seed and epoch.
    """

    def __init__(self, rows: PromptDataset, window: int, *, seed: int) -> None:
        lengths_N = rows.rows.lengths("prompt_ids") + rows.rows.lengths("response_ids")
        self.lengths = lengths_N.tolist()
        self.window, self.seed, self.epoch = window, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the order depends on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        # With the global generator the order would depend on everything else that draws from it.
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.window, generator=draw))


class PromptStream(IterableDataset):
    """Rows that are encoded while they are read, in their order and again in each epoch.

    No row is kept in memory.  A malformed row raises DataError when it is reached, unless the rules
    skip it.  On several ranks, each one encodes only its own rows, which are dealt out in turn.
    """

    def __init__(
        self,
        rows: Callable[[], Iterable[tuple[str, Any]]],
        tokenizer: PreTrainedTokenizerBase,
        rules: Rules,
    ) -> None:
        self.read, self.tokenizer, self.rules = rows, tokenizer, rules
        self.counts = RowCounts()
        self._rank, self._ranks, self._batch_size, self._drop_last = 0, 1, 1, False

    def deal_out(self, rank: int, ranks: int, batch_size: int, *, drop_last: bool = True) -> None:
        """Give this rank its rows only, in batches of this size.

        On several ranks the last batch of a pass is always left out if it is not full.
        """
        self._rank, self._ranks, self._batch_size = rank, ranks, batch_size
        self._drop_last = drop_last or ranks > 1

    def __iter__(self) -> Iterator[Row]:
        self.counts = RowCounts()  # of this pass alone
        on_bad = _skip if self.rules.skip_bad else _stop
        encoder = Encoder(self.tokenizer, self.rules)
        share = (self._rank, self._ranks)
        own = encoder.rows(self.read(), self.counts, on_bad, share)
        if not self._drop_last:
            yield from own
        # Accelerate takes this rank's part of the batches of all ranks, so that every part is ours.
        # The last batch is left out if it is not full, as part of a batch would not be ours.
        while len(batch := list(itertools.islice(own, self._batch_size))) == self._batch_size:
            yield from batch * self._ranks

    def head(self, number: int) -> list[Row]:
        """Read and return the first rows; the next pass starts at the first row again."""
        return list(itertools.islice(iter(self), number))


EncodedRows = PromptDataset | PromptStream  # the rows that a trainer accepts


def _skip(_error: DataError) -> None:
    """Do nothing: the encoder has counted the row."""


def _stop(error: DataError) -> None:
    raise error


def fingerprint(rows: EncodedRows) -> str:
    """Return a hash of the ids of all rows; of a stream, of its first rows."""
    found = rows.rows if isinstance(rows, PromptDataset) else Rows.of(rows.head(FIRST_ROWS))
    return found.digest()


def sample_text(rows: EncodedRows, number: int) -> Prompts:
    """Return the first rows as plain text with their responses, to carve a model by.

    The ids are packed as prompts, which are padded on the left.
    """
    texts = [[*row.prompt_ids, *(row.response_ids or [])] for row in rows.head(number)]
    return Prompts.pack(texts, range(len(texts)), pad_id=0)


def collate(rows: Sequence[Row]) -> Prompts:
    """Return rows as one batch of prompts, with responses if every row has one.

    Prompts are padded on the left with id 0, which the attention mask hides.
    """
    responses = [row.response_ids for row in rows]
    return Prompts.pack(
        [row.prompt_ids for row in rows],
        [row.row_id for row in rows],
        pad_id=0,
        responses=None if any(r is None for r in responses) else [r or [] for r in responses],
    )
