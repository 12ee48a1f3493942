"""Encoded rows as a data set that a trainer can draw from, and as batches of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from llmdistill.batch import Prompts
from llmdistill.data.validate import Counts, Row, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptDataset(Dataset):
    """Encoded rows, with what became of the rows that they were made from."""

    def __init__(self, rows: Sequence[Row], counts: Counts | None = None) -> None:
        self.rows = list(rows)
        self.counts = counts or Counts(read=len(self.rows), kept=len(self.rows))

    @classmethod
    def encode(
        cls, rows: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> PromptDataset:
        """From (place, row) pairs; the options are those of `validate.encode`."""
        return cls(*encode(rows, tokenizer, **options))

    @classmethod
    def of(
        cls,
        rows: PromptDataset | Iterable[dict[str, Any]] | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> PromptDataset | None:
        """What a user hands over: rows in any form, an encoded data set, or nothing."""
        if rows is None or isinstance(rows, PromptDataset):
            return rows
        return cls.encode(((f"row {i}", row) for i, row in enumerate(rows)), tokenizer)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def hold_back(self, number: int) -> tuple[PromptDataset, PromptDataset]:
        """All rows but `number` evenly spaced ones, and those: the same split in every run."""
        held = {(2 * i + 1) * len(self) // (2 * number) for i in range(number)}
        kept = [row for place, row in enumerate(self.rows) if place not in held]
        return PromptDataset(kept, self.counts), PromptDataset([self.rows[i] for i in sorted(held)])


def collate(rows: Sequence[Row]) -> Prompts:
    """Rows as one batch of prompts; with responses where every row has one."""
    responses = [row.response_ids for row in rows]
    return Prompts.pack(
        [row.prompt_ids for row in rows],
        [row.row_id for row in rows],
        pad_id=0,
        responses=None if any(r is None for r in responses) else [r or [] for r in responses],
    )
