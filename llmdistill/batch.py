"""What travels between the parts of a run.

    Prompts  --write-->  Sequences  --judge-->  TeacherSignal  --match-->  LossSum

B = sequences, P = prompt tokens, T = tokens, N = predicted tokens, V = vocabulary, H = hidden size.
Prompts are padded on the left, so that writing starts in one column; sequences are padded on the
right.  "Predicted" tokens are those of `response_mask_BT`; the state that predicts the token in
column t stands in column t - 1.  That shift is made here (`predictor_mask_BT`) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmdistill.distributions import Dense as Dense
from llmdistill.distributions import Distribution
from llmdistill.models.heads import Head
from llmdistill.models.taps import Need
from llmdistill.sampling import Writer


class LossSum(NamedTuple):
    """A loss summed over tokens, and their number: `total / num_tokens` is the mean in nats.

    Over a whole step a sum is divided by its objective's own `divisor`.
    """

    total: Tensor
    num_tokens: Tensor


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
    their own embeddings.  `signal` is there if the teacher has already read what was kept while it
    was written, and `teacher_passes_B` then counts the teacher's passes over each row.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    response_mask_BT: Tensor
    row_ids_B: Tensor
    writer_BT: Tensor
    writer_logprob_BT: Tensor | None = None
    teacher_passes_B: Tensor | None = None
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
    def trained_mask_BT(self) -> Tensor:
        """True for all tokens, prompts included, of the rows that predict something.

        Filler rows predict nothing, so they count in no objective.
        """
        return self.attention_mask_BT.bool() & (self.num_predicted > 0)[:, None]

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
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)

    def select(self, rows: Tensor) -> Sequences:
        """The rows at these places, without the columns that only the others needed."""
        width = int(self.attention_mask_BT[rows].sum(1).max()) if len(rows) else 0
        cut: dict[str, Any] = {
            item.name: value[rows, :width] if value.dim() == 2 else value[rows]
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
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
    """What an objective sees of the student: one reading of a batch.

    `hidden_NH` are the final hidden states that predict the N tokens, `head` what turns them into
    logits of the shared ids, and `states` what its `student_needs` asked for: (N, ...) for
    predicted tokens, (M, ...) for all M tokens of the rows that predict something, row by row.
    """

    hidden_NH: Tensor
    head: Head
    states: Mapping[Need, Tensor] = field(default_factory=dict)

    def detach(self) -> StudentView:
        """The same numbers without a way back for gradients."""
        states = {need: state.detach() for need, state in self.states.items()}
        return StudentView(self.hidden_NH.detach(), self.head.detach(), states)


@dataclass(frozen=True)
class TeacherSignal:
    """What a teacher says of the N predicted tokens; a part that nobody asked for is missing.

    `states` are as in `StudentView`, in the teacher's widths; objectives get them on the student's
    device.
    """

    distribution: Distribution | None = None
    states: Mapping[Need, Tensor] = field(default_factory=dict)

    def covers(self, needs: frozenset[Need]) -> bool:
        """Is everything here that these needs ask for?"""
        there = set(self.states)
        if self.distribution is not None:
            there.add(Need.DISTRIBUTION)
        return needs <= there

    def narrow(self, num_tokens: int) -> TeacherSignal:
        """With the distribution over the ids that both sides share."""
        if self.distribution is None:
            return self
        return replace(self, distribution=self.distribution.narrow(num_tokens))

    def states_on(self, device: torch.device | str) -> TeacherSignal:
        """With the states on this device; the distribution stays where it is."""
        states = {need: state.to(device) for need, state in self.states.items()}
        return replace(self, states=states)

    def select(self, places: Tensor) -> TeacherSignal:
        """The signal at some of the N tokens: by number, or by a mask (N,)."""
        states = {need: state[places.to(state.device)] for need, state in self.states.items()}
        found = self.distribution
        return TeacherSignal(None if found is None else found.select(places), states)

    def to(self, device: torch.device | str) -> TeacherSignal:
        """With what is kept per token on this device; a head stays where its model is."""
        found = self.distribution
        moved = None if found is None else found.to(device)
        return replace(self.states_on(device), distribution=moved)

    def detach(self) -> TeacherSignal:
        """The same numbers without a way back for gradients."""
        states = {need: state.detach() for need, state in self.states.items()}
        found = self.distribution
        return TeacherSignal(None if found is None else found.detach(), states)
