"""The state of an interleaved rollout: the active rows, and the tokens that are kept.

It is on the CPU, except the teacher's states and log-probabilities.

P = prompt tokens, T = tokens, A = active rows, B = all rows, G = tokens of a block, n = tokens of
it that are kept, N = all kept tokens, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.decoding.transfer import fetch, send
from llmdistill.distributions import Dense
from llmdistill.models.heads import Head
from llmdistill.sampling import Writer


@dataclass(frozen=True)
class ActiveRows:
    """The rows that are still in the batch; some may have ended and wait to be removed."""

    row_A: Tensor  # indices in the batch
    last_A1: Tensor  # the last token written, which neither model has read
    prompt_A: Tensor  # tokens of the prompt
    written_A: Tensor  # tokens of the response so far
    room_A: Tensor  # tokens that still fit; 0 once the response has ended

    @classmethod
    def start(cls, prompts: Prompts, room: int) -> ActiveRows:
        """Return all rows, with empty responses and `room` tokens left."""
        row_A = torch.arange(len(prompts))
        return cls(
            row_A,
            prompts.input_ids_BP[:, -1:],
            prompts.attention_mask_BP.sum(1),
            torch.zeros_like(row_A),
            torch.full_like(row_A, room),
        )

    def __len__(self) -> int:
        return len(self.row_A)

    @property
    def last_position_A(self) -> Tensor:
        """The position of each row's last possible token, counted from 0: (A,)."""
        return self.prompt_A + self.written_A + self.room_A - 1

    def slots(self, size: int) -> Tensor:
        """Return the next `size` positions of each response: (A, G)."""
        return self.written_A[:, None] + torch.arange(size)

    def after(self, tokens_AG: Tensor, count_A: Tensor, ended_A: Tensor) -> ActiveRows:
        """Return the rows after the first `count_A` of these tokens were kept."""
        # A row that keeps nothing has no newest token; the clamp only makes its index valid.
        newest_A1 = tokens_AG.gather(1, (count_A - 1).clamp_min(0)[:, None])
        return replace(
            self,
            last_A1=torch.where(count_A[:, None] > 0, newest_A1, self.last_A1),
            written_A=self.written_A + count_A,
            room_A=torch.where(ended_A, 0, self.room_A - count_A),
        )

    def select(self, places: Tensor) -> ActiveRows:
        """Return the rows at these indices."""
        return ActiveRows(
            **{field.name: getattr(self, field.name)[places] for field in fields(self)}
        )


class Verified(NamedTuple):
    """A block after the acceptance rule and the replacements, on the teacher's device."""

    tokens_AG: Tensor
    accepted_A: Tensor  # drafted tokens of each row before its first refusal
    log_prob_AG: Tensor | None  # with which they were written, in nats, if the rule knows it

    @classmethod
    def join(cls, parts: Sequence[Verified]) -> Verified:
        """Return the rows of several parts as one block."""
        tokens, accepted, log_probs = zip(*parts, strict=True)
        joined = None if log_probs[0] is None else torch.cat(log_probs)
        return cls(torch.cat(tokens), torch.cat(accepted), joined)


class Piece(NamedTuple):
    """The kept tokens of one block, with the teacher's states that predict them.

    States and log-probabilities are on the teacher's device.
    """

    row_n: Tensor
    slot_n: Tensor
    token_n: Tensor
    writer_n: Tensor
    hidden_nH: Tensor
    log_prob_n: Tensor | None


class Responses:
    """The pieces of all blocks, which `sequences` joins row by row."""

    def __init__(self, num_rows: int) -> None:
        self._pieces: list[Piece] = []
        self._teacher_passes_B = torch.zeros(num_rows, dtype=torch.long)

    def add(self, piece: Piece) -> None:
        """Add the kept tokens of one block, and count one pass of the teacher for its rows."""
        self._pieces.append(piece)
        self._teacher_passes_B[piece.row_n.unique()] += 1

    def sequences(self, prompts: Prompts, head: Head) -> Sequences:
        """Return the prompts with their responses, the writers and the teacher's signal."""
        columns = list(zip(*self._pieces, strict=True))
        row_N, slot_N = torch.cat(columns[0]), torch.cat(columns[1])
        # Pieces are in the order of their blocks; this key sorts them by row, then by position.
        order_N = (row_N * (slot_N.max() + 1) + slot_N).argsort()
        token_N, writer_N = (torch.cat(column)[order_N] for column in columns[2:4])
        hidden_NH = torch.cat(columns[4])
        hidden_NH = hidden_NH[send(order_N, hidden_NH.device)]
        counts = row_N.bincount(minlength=len(prompts)).tolist()
        written = Sequences.pack(
            prompts.ids(),
            [ids.tolist() for ids in token_N.split(counts)],
            prompts.row_ids_B.tolist(),
            writer=Writer.STUDENT,
            pad_id=0,  # Every mask leaves padding out, so any id works.
        )
        mask_BT, log_prob_BT = written.response_mask_BT, None
        if columns[5][0] is not None:
            log_prob_N = fetch(torch.cat(columns[5]))[order_N]
            log_prob_BT = torch.zeros(mask_BT.shape).masked_scatter(mask_BT, log_prob_N)
        return replace(
            written,
            writer_BT=written.writer_BT.masked_scatter(mask_BT, writer_N),
            writer_logprob_BT=log_prob_BT,
            teacher_passes_B=self._teacher_passes_B,
            signal=TeacherSignal(Dense(hidden_NH, head)),
        )
