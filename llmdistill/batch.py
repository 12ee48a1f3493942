"""The data that rollouts, teachers, objectives and the trainer exchange.

    Prompts  --write-->  Sequences  --judge-->  TeacherSignal  --match-->  LossSum

B = sequences, P = prompt tokens, T = tokens, N = predicted tokens, V = vocabulary, H = hidden size.
Prompts are padded on the left, so that all responses start in the same column.  Sequences are
padded on the right.  "Predicted" tokens are those of `response_mask_BT`.  The state that predicts
the token in column t is in column t - 1.  That shift is made here (`predictor_mask_BT`) and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmdistill.distributions import Dense as Dense
from llmdistill.distributions import Distribution
from llmdistill.models.heads import Head
from llmdistill.models.taps import Need
from llmdistill.sampling import Writer

Embed = Callable[[Tensor], Tensor]  # a model's embeddings of token ids: (B, T) -> (B, T, H)


class LossSum(NamedTuple):
    """A loss, summed over the tokens of one micro-batch.

    `total` is the sum: (), with gradients, in nats for distributions.  `num_tokens` is the number
    of predicted tokens: (), an integer.  The trainer does not divide by `num_tokens`; it divides
    the sum over a whole step by the objective's own `divisor`.
    """

    total: Tensor
    num_tokens: Tensor


@dataclass(frozen=True)
class Prompts:
    """The prompts of B rows, padded on the left.

    `input_ids_BP` holds token ids, `attention_mask_BP` is 1 at tokens and 0 at padding, and
    `row_ids_B` names the rows of the dataset; all three are int64.  `responses` holds the token ids
    of the dataset's own responses, without padding.  It is None if the dataset has none.
    """

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
        """Return a batch of these prompts, given as lists of token ids without padding."""
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
        """Return several batches as one, padded to the longest prompt of all.

        The result has responses only if every part has them.
        """
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
        """Return the token ids of each prompt, without padding."""
        rows = zip(self.input_ids_BP.tolist(), self.attention_mask_BP.tolist(), strict=True)
        return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]

    def select(self, rows: Sequence[int], *, pad_id: int) -> Prompts:
        """Return the rows at these indices, in this order, padded to the longest of them."""
        places = torch.as_tensor(rows, dtype=torch.long)
        mask_BP = self.attention_mask_BP[places]
        # Padding is on the left, so the columns before the longest row are all padding.
        longest = int(mask_BP.sum(1).max()) if len(places) else 0
        start = mask_BP.shape[1] - longest
        ids_BP = self.input_ids_BP[places, start:].masked_fill(mask_BP[:, start:] == 0, pad_id)
        kept = None if self.responses is None else tuple(self.responses[row] for row in rows)
        return Prompts(ids_BP, mask_BP[:, start:], self.row_ids_B[places], kept)


@dataclass(frozen=True)
class Sequences:
    """Prompts with one response each, padded on the right: the output of a rollout."""

    input_ids_BT: Tensor
    """Token ids, int64."""
    attention_mask_BT: Tensor
    """1 at prompt and response tokens, 0 at padding, int64."""
    response_mask_BT: Tensor
    """True at the tokens that the student learns to predict."""
    row_ids_B: Tensor
    """The row of the dataset that each sequence belongs to."""
    writer_BT: Tensor
    """Who wrote each token, as a `Writer`; DATA at prompts and padding."""
    writer_logprob_BT: Tensor | None = None
    """Log-probability with which each token was drawn, in nats, if the rollout keeps it."""
    teacher_passes_B: Tensor | None = None
    """Forward passes of the teacher that added tokens to each row, if the rollout counts them."""
    embedding_change: Callable[[Embed, Tensor], Tensor] | None = None
    """A function of a model's `Embed` and the ids (B, T) that returns what it reads: (B, T, H).

    Student and teacher each call it with their own embeddings.
    """
    signal: TeacherSignal | None = None
    """The teacher's output for the predicted tokens, if it read them while they were written."""

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
        """Return prompts and responses of one writer, joined and padded on the right.

        Args:
            prompts: Token ids of each prompt, without padding.
            responses: Token ids of each response, in the order of the prompts.
            row_ids: The row of the dataset that each prompt belongs to.
            writer: Who wrote all of the responses.
            pad_id: The id at padding; it has no effect, because every mask leaves it out.
        """
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

    @classmethod
    def join(cls, parts: Sequence[Sequences]) -> Sequences:
        """Return several batches as one, padded to the longest row of all.

        An optional field is kept if all parts have it.  All parts must have the same change of
        embeddings.
        """
        width = max(part.input_ids_BT.shape[1] for part in parts)
        joined: dict[str, Any] = {"embedding_change": parts[0].embedding_change}
        for name in (item.name for item in fields(cls)):
            values = [getattr(part, name) for part in parts]
            if all(isinstance(value, Tensor) for value in values):
                joined[name] = torch.cat([widened(value, width) for value in values])
        signals = [part.signal for part in parts if part.signal is not None]
        if len(signals) == len(parts):
            joined["signal"] = TeacherSignal.join(signals)
        return cls(**joined)

    def __len__(self) -> int:
        return len(self.row_ids_B)

    @property
    def predictor_mask_BT(self) -> Tensor:
        """A mask, True in column t if the token in column t + 1 is predicted: (B, T).

        The last column is always False.
        """
        shifted = torch.zeros_like(self.response_mask_BT)
        shifted[:, :-1] = self.response_mask_BT[:, 1:]
        return shifted

    @property
    def trained_mask_BT(self) -> Tensor:
        """A mask, True at all tokens of the rows that have a predicted token: (B, T).

        Prompt tokens are included.  Filler rows have no predicted token, so they do not count in
        any objective.
        """
        return self.attention_mask_BT.bool() & (self.num_predicted > 0)[:, None]

    @property
    def targets_N(self) -> Tensor:
        """The ids of the predicted tokens, row by row: (N,)."""
        return self.input_ids_BT[:, 1:][self.response_mask_BT[:, 1:]]

    @property
    def target_writers_N(self) -> Tensor:
        """The `Writer` of each predicted token, row by row: (N,)."""
        return self.writer_BT[:, 1:][self.response_mask_BT[:, 1:]]

    @property
    def num_predicted(self) -> Tensor:
        """The number of predicted tokens of each row: (B,)."""
        # The first column has no state before it, so its token is never predicted.
        return self.response_mask_BT[:, 1:].sum(1)

    def responses(self) -> list[list[int]]:
        """Return the token ids of each row's response."""
        return [
            ids[mask].tolist()
            for ids, mask in zip(self.input_ids_BT, self.response_mask_BT, strict=True)
        ]

    def to(self, device: torch.device | str) -> Sequences:
        """Return the batch on a device; `signal` stays on the teacher's device."""
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)

    def select(self, rows: Tensor) -> Sequences:
        """Return the rows at these indices, cut to the longest of them.

        The signal is cut along with its rows.
        """
        # Padding is on the right, so the columns beyond the longest row are all padding.
        width = int(self.attention_mask_BT[rows].sum(1).max()) if len(rows) else 0
        cut: dict[str, Any] = {
            item.name: value[rows, :width] if value.dim() == 2 else value[rows]
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        if self.signal is not None:
            places = torch.arange(int(self.num_predicted.sum())).split(self.num_predicted.tolist())
            chosen = torch.cat([torch.arange(0), *(places[row] for row in rows.tolist())])
            # The signal is one flat list of N tokens, so each row owns a run of it.
            cut["signal"] = self.signal.select(chosen)
        return replace(self, **cut)

    def without_loss(self, rows_B: Tensor) -> Sequences:
        """Return the same batch, in which the rows marked True have no predicted token.

        The rows stay in the batch, and `signal` loses their tokens.
        """
        signal = self.signal
        if signal is not None:
            signal = signal.select(~rows_B.repeat_interleave(self.num_predicted))
        mask_BT = self.response_mask_BT & ~rows_B[:, None]
        return replace(self, response_mask_BT=mask_BT, signal=signal)


@dataclass(frozen=True)
class StudentView:
    """The output of the student's forward pass, as objectives see it.

    `hidden_NH` holds the final hidden states that predict the N tokens, and `head` turns them into
    logits over the ids that student and teacher share.  `states` holds the inner states that the
    objectives list in `student_needs`, row by row: (N, ...) for predicted tokens, or (M, ...) for
    all M tokens of the rows that have a predicted token.
    """

    hidden_NH: Tensor
    head: Head
    states: Mapping[Need, Tensor] = field(default_factory=dict)

    def detach(self) -> StudentView:
        """Return the same numbers, cut off from the autograd graph."""
        states = {need: state.detach() for need, state in self.states.items()}
        return StudentView(self.hidden_NH.detach(), self.head.detach(), states)


@dataclass(frozen=True)
class TeacherSignal:
    """The output of the teacher's forward pass at the N predicted tokens.

    It holds only what was asked for.  `distribution` is the next-token distribution, or None.
    `states` are as in `StudentView`, but with the teacher's widths.  Objectives get them on the
    student's device.
    """

    distribution: Distribution | None = None
    states: Mapping[Need, Tensor] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence[TeacherSignal]) -> TeacherSignal | None:
        """Return the signals of several batches as one, or None if one cannot be joined.

        States and the hidden states of one model can be joined; other distributions cannot.
        """
        dense = [part.distribution for part in parts if isinstance(part.distribution, Dense)]
        names = set(parts[0].states)
        if len(dense) < len(parts) or any(set(part.states) != names for part in parts):
            return None
        hidden_NH = torch.cat([one.hidden_NH for one in dense])
        states = {need: torch.cat([part.states[need] for part in parts]) for need in names}
        return cls(Dense(hidden_NH, dense[0].head), states)

    def covers(self, needs: frozenset[Need]) -> bool:
        """Whether the signal contains everything that these needs ask for."""
        there = set(self.states)
        if self.distribution is not None:
            there.add(Need.DISTRIBUTION)
        return needs <= there

    def narrow(self, num_tokens: int) -> TeacherSignal:
        """Return the signal with its distribution cut to the first `num_tokens` ids.

        Raises ModelError if the distribution has fewer ids.
        """
        if self.distribution is None:
            return self
        return replace(self, distribution=self.distribution.narrow(num_tokens))

    def states_on(self, device: torch.device | str) -> TeacherSignal:
        """Return the signal with its states on a device; the distribution stays where it is."""
        states = {need: state.to(device) for need, state in self.states.items()}
        return replace(self, states=states)

    def select(self, places: Tensor) -> TeacherSignal:
        """Return the signal at some of the N tokens, given by index or by a mask (N,)."""
        states = {need: state[places.to(state.device)] for need, state in self.states.items()}
        found = self.distribution
        return TeacherSignal(None if found is None else found.select(places), states)

    def to(self, device: torch.device | str) -> TeacherSignal:
        """Return the signal with its per-token tensors on a device.

        A head stays on the device of its model.
        """
        found = self.distribution
        moved = None if found is None else found.to(device)
        return replace(self.states_on(device), distribution=moved)

    def detach(self) -> TeacherSignal:
        """Return the same numbers, cut off from the autograd graph."""
        states = {need: state.detach() for need, state in self.states.items()}
        found = self.distribution
        return TeacherSignal(None if found is None else found.detach(), states)


def widened(rows: Tensor, width: int) -> Tensor:
    """Return per-token rows padded on the right to a width; per-row values stay as they are."""
    return rows if rows.dim() == 1 else pad(rows, (0, width - rows.shape[1]))
