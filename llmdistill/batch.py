"""What travels between the parts of a run.

    Prompts  --write-->  Sequences  --judge-->  TeacherSignal  --match-->  LossSum

B = sequences, P = prompt tokens, T = tokens, N = predicted tokens, V = vocabulary, H = hidden size.
Prompts are padded on the left, so that writing starts in one column; sequences are padded on the
right.  "Predicted" tokens are those of `response_mask_BT`; the state that predicts the token in
column t stands in column t - 1.  That shift is made here (`predictor_mask_BT`) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmdistill.models.heads import Head
from llmdistill.sampling import Writer


class LossSum(NamedTuple):
    """A loss summed over predicted tokens, and their number.
    `total / count` is the mean in nats.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment] # a tuple has a method of this name


@dataclass(frozen=True)
class Prompts:
    """Prompts of B rows, padded on the left, with the data set's responses where it has them."""

    input_ids_BP: Tensor
    attention_mask_BP: Tensor
    row_ids_B: Tensor
    responses: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Sequence[int]],
        row_ids: Sequence[int],
        *,
        pad_id: int,
        responses: Sequence[Sequence[int]] | None = None,
    ) -> Prompts:
        width = max((len(ids) for ids in prompts), default=0)
        ids_BP = torch.full((len(prompts), width), pad_id)
        mask_BP = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, ids in enumerate(prompts):
            ids_BP[row, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
            mask_BP[row, width - len(ids) :] = 1
        kept = None if responses is None else tuple(tuple(ids) for ids in responses)
        return cls(ids_BP, mask_BP, torch.tensor(row_ids, dtype=torch.long), kept)

    @classmethod
    def join(cls, parts: Sequence[Prompts], *, pad_id: int) -> Prompts:
        """Several batches as one, padded anew."""
        responses = None
        if all(part.responses is not None for part in parts):
            responses = [ids for part in parts for ids in part.responses or ()]
        return cls.pack(
            [ids for part in parts for ids in part.ids()],
            [row for part in parts for row in part.row_ids_B.tolist()],
            pad_id=pad_id,
            responses=responses,
        )

    def __len__(self) -> int:
        return len(self.row_ids_B)

    def ids(self) -> list[list[int]]:
        """The prompts without padding."""
        rows = zip(self.input_ids_BP.tolist(), self.attention_mask_BP.tolist(), strict=True)
        return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]

    def select(self, rows: Sequence[int], *, pad_id: int) -> Prompts:
        """The rows at these places, padded anew."""
        ids, row_ids = self.ids(), self.row_ids_B.tolist()
        return Prompts.pack(
            [ids[row] for row in rows],
            [row_ids[row] for row in rows],
            pad_id=pad_id,
            responses=None if self.responses is None else [self.responses[row] for row in rows],
        )


@dataclass(frozen=True)
class Sequences:
    """Prompts with their responses, padded on the right: what a rollout writes.

    `embedding_change`, a function (B, T, H) -> (B, T, H), is applied by student and teacher to
    their own embeddings.  `signal` is there when the writer has already judged what it kept, and
    `judgements_B` then counts the teacher's passes over each row.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    response_mask_BT: Tensor
    row_ids_B: Tensor
    writer_BT: Tensor
    writer_logprob_BT: Tensor | None = None
    judgements_B: Tensor | None = None
    embedding_change: Callable[[Tensor], Tensor] | None = None
    signal: TeacherSignal | None = None

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        row_ids: Sequence[int],
        *,
        writer: Writer,
        pad_id: int,
    ) -> Sequences:
        """One writer's responses behind their prompts."""
        pairs = list(zip(prompts, responses, strict=True))
        width = max((len(prompt) + len(response) for prompt, response in pairs), default=0)
        ids_BT = torch.full((len(pairs), width), pad_id)
        attention_BT = torch.zeros(len(pairs), width, dtype=torch.long)
        response_BT = torch.zeros(len(pairs), width, dtype=torch.bool)
        for row, (prompt, response) in enumerate(pairs):
            start, end = len(prompt), len(prompt) + len(response)
            ids_BT[row, :end] = torch.tensor([*prompt, *response], dtype=torch.long)
            attention_BT[row, :end] = 1
            response_BT[row, start:end] = True
        writer_BT = torch.where(response_BT, int(writer), int(Writer.DATA))
        rows_B = torch.tensor(row_ids, dtype=torch.long)
        return cls(ids_BT, attention_BT, response_BT, rows_B, writer_BT)

    def __len__(self) -> int:
        return len(self.row_ids_B)

    @property
    def predictor_mask_BT(self) -> Tensor:
        """True in column t where the token in column t + 1 is predicted; never in the last
        column.
        """
        shifted = torch.zeros_like(self.response_mask_BT)
        shifted[:, :-1] = self.response_mask_BT[:, 1:]
        return shifted

    @property
    def targets_N(self) -> Tensor:
        """The predicted tokens, row by row: (N,)."""
        return self.input_ids_BT[:, 1:][self.response_mask_BT[:, 1:]]

    @property
    def target_writers_N(self) -> Tensor:
        """Who wrote each predicted token: (N,)."""
        return self.writer_BT[:, 1:][self.response_mask_BT[:, 1:]]

    @property
    def num_predicted(self) -> Tensor:
        """Predicted tokens of each row: (B,)."""
        return self.response_mask_BT[:, 1:].sum(1)

    def responses(self) -> list[list[int]]:
        """The predicted tokens of each row, as ids."""
        return [
            ids[mask].tolist()
            for ids, mask in zip(self.input_ids_BT, self.response_mask_BT, strict=True)
        ]

    def to(self, device: torch.device | str) -> Sequences:
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def select(self, rows: Tensor) -> Sequences:
        """The rows at these places, without the columns that only the others needed."""
        width = int(self.attention_mask_BT[rows].sum(1).max()) if len(rows) else 0
        cut: dict[str, Any] = {
            field.name: value[rows, :width] if value.dim() == 2 else value[rows]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if self.signal is not None:
            places = torch.arange(int(self.num_predicted.sum())).split(self.num_predicted.tolist())
            chosen = torch.cat([torch.arange(0), *(places[row] for row in rows.tolist())])
            cut["signal"] = self.signal.select(chosen)
        return replace(self, **cut)

    def without_loss(self, rows_B: Tensor) -> Sequences:
        """The same batch in which the rows marked True predict nothing."""
        signal = self.signal
        if signal is not None:
            signal = signal.select(~rows_B.repeat_interleave(self.num_predicted))
        mask_BT = self.response_mask_BT & ~rows_B[:, None]
        return replace(self, response_mask_BT=mask_BT, signal=signal)


@dataclass(frozen=True)
class StudentView:
    """What an objective sees of the student: the states that predict the N tokens, and its head."""

    hidden_NH: Tensor
    head: Head


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's judgement of the N predicted tokens: final hidden states and the head over
    them.
    """

    hidden_NH: Tensor
    head: Head

    def select(self, places: Tensor) -> TeacherSignal:
        """The judgement of some of the N tokens: by number, or by a mask (N,)."""
        return replace(self, hidden_NH=self.hidden_NH[places.to(self.hidden_NH.device)])
