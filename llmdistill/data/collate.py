"""Encoded rows as a dataset that a trainer can draw from, and as batches of prompts."""

from __future__ import annotations

import hashlib
import itertools
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from llmdistill.batch import Prompts
from llmdistill.data.validate import Row, RowCounts, Rules, encode, stream
from llmdistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_ROWS = 64  # rows of a stream that stand for all of them


class PromptDataset(Dataset):
    """Encoded rows in memory, with the counts of the rows that they were made from."""

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
        """Encode (place, row) pairs.  Raises DataError as `validate.encode` does."""
        return cls(*encode(rows, tokenizer, rules))

    @classmethod
    def of(
        cls,
        rows: EncodedRows | Iterable[dict[str, Any]] | None,
        tokenizer: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase | None = None,
    ) -> EncodedRows | None:
        """Return rows that a user passes in as a dataset; encoded rows and None are returned as is.

        `rows` can be dicts in any form of `formats.py`.  Raises DataError if one is malformed, and
        VocabularyError if the tokenizer of the teacher renders one differently.
        """
        if rows is None or isinstance(rows, PromptDataset | PromptStream):
            return rows
        rules = Rules(others=() if teacher is None else (teacher,))
        return cls.encode(((f"row {i}", row) for i, row in enumerate(rows)), tokenizer, rules)

    @classmethod
    def join(
        cls,
        parts: Sequence[tuple[PromptDataset, float]],
        *,
        seed: int,
        without: frozenset[int] = frozenset(),
    ) -> PromptDataset:
        """Join several datasets into one, with as many copies of each row as its part's weight.

        A weight of 2.5 takes every row twice and half of them once more, the same ones in every run
        with this seed.  Each copy has a separate row id, so a model writes another answer to it.
        Rows whose id is in `without` are left out.
        """
        rows: list[Row] = []
        copies: list[Row] = []
        total = RowCounts()
        for part, weight in parts:
            for row in part.rows:
                # The ids of a part count its dropped examples too, so the offset must as well.
                placed = replace(row, row_id=total.examples + row.row_id)
                if placed.row_id in without:
                    continue
                drawn = random.Random(f"{seed}/{placed.row_id}").random() < weight % 1
                times = int(weight) + drawn
                rows += [placed] * (times > 0)
                copies += [placed] * (times - 1)
            total += part.counts
        # First copies keep their ids whatever the weights are; further copies are numbered after
        # all of them.
        numbered = (replace(row, row_id=total.examples + i) for i, row in enumerate(copies))
        return cls([*rows, *numbered], total)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def head(self, number: int) -> list[Row]:
        """Return the first rows."""
        return self.rows[:number]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """The number of tokens of each prompt."""
        return np.array([len(row.prompt_ids) for row in self.rows])

    def hold_back(self, number: int) -> tuple[PromptDataset, PromptDataset]:
        """Split off at least `number` rows, of evenly spaced questions; return the others first.

        Rows with the same prompt stay together, because a held-out question must not be trained
        with another answer.  The split is the same in every run.  `number` must be smaller than the
        number of rows.
        """
        questions: dict[Any, list[int]] = {}
        for place, row in enumerate(self.rows):
            questions.setdefault(question(row), []).append(place)
        # A question with very many rows would hold out most of the data.
        largest = max(number, min(map(len, questions.values()), default=0))
        groups = [places for places in questions.values() if len(places) <= largest]
        if (few := sum(map(len, groups))) < number:
            raise DataError(
                f"data.hold_back: only {few} rows belong to questions with at most {number} rows, "
                "and questions are held back whole. Set a smaller number, or use data.eval."
            )
        for count in range(-(-number // max(map(len, groups))), len(groups) + 1):
            # The middle of each of `count` equal parts.
            middles = ((2 * i + 1) * len(groups) // (2 * count) for i in range(count))
            held = sorted(place for middle in middles for place in groups[middle])
            if len(held) >= number:
                break
        without = set(held)
        kept = [row for place, row in enumerate(self.rows) if place not in without]
        return PromptDataset(kept, self.counts), PromptDataset([self.rows[i] for i in held])


def question(row: Row) -> Any:
    """Return what makes two rows the same question: the prompt, and the images of a row.

    Plain text has no prompt, so all of it counts.
    """
    text = row.response_ids if row.is_text else None
    images = repr(row.columns) if row.messages else ""  # only a teacher of images reads messages
    return (*row.prompt_ids, *(text or ())), images


class ByLength(Sampler[int]):
    """A random order of rows in which neighbours have similar lengths.

    `window` is the number of rows that are grouped, those of one accumulation window.  The order
    depends only on seed and epoch.
    """

    def __init__(self, rows: PromptDataset, window: int, *, seed: int) -> None:
        self.lengths = [len(row.prompt_ids) + len(row.response_ids or ()) for row in rows.rows]
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
    skip it.
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
        self.counts = RowCounts()  # of this pass alone
        on_bad = _skip if self.rules.skip_bad else _stop
        yield from stream(self.read(), self.tokenizer, self.rules, self.counts, on_bad)

    def head(self, number: int) -> list[Row]:
        """Read and return the first rows; the next pass starts at the first row again."""
        return list(itertools.islice(iter(self), number))


EncodedRows = PromptDataset | PromptStream  # the rows that a trainer accepts


def _skip(_error: DataError) -> None:
    """Do nothing: `stream` has counted the row."""


def _stop(error: DataError) -> None:
    raise error


def fingerprint(rows: EncodedRows) -> str:
    """Return a hash of the ids of all rows; of a stream, of its first rows."""
    found = hashlib.sha256()
    for row in rows.rows if isinstance(rows, PromptDataset) else rows.head(FIRST_ROWS):
        for ids in (row.prompt_ids, row.response_ids, row.teacher_prompt_ids):
            found.update(array("q", [row.row_id, *(ids or ())]).tobytes())
        found.update(repr(row.columns).encode() if row.columns else b"")
    return found.hexdigest()


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
