"""One vector for each response, and the samples of all ranks together.

B = rows of this rank with a predicted token, S = samples of all ranks, N = predicted tokens.
D = width, T = tokens of a row, X = any further dimensions.

An objective that compares samples gives the same gradient on several ranks as on one.  Each rank
computes the mean over the samples of all ranks, with gradients for its own rows.  Summed over the
ranks, these are all gradients of the mean.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llmdistill.batch import Sequences
from llmdistill.models.hashing import mix64
from llmdistill.objectives.choices import choose
from llmdistill.objectives.layer_maps import LAST_LAYERS, Layers
from llmdistill.objectives.states import Compared, StateObjective, tokens_of_rows
from llmdistill.objectives.weights import responses
from llmdistill.schedules import Schedule

Pool = Callable[[Tensor], Tensor]  # the states of one response (N, D) -> (D,)


def mean(states_ND: Tensor) -> Tensor:
    """Take the mean of the states of a response: (D,).  There are no options."""
    return states_ND.mean(0)


def last(states_ND: Tensor) -> Tensor:
    """Take the state that predicts the last token of a response, which has read all others: (D,).

    There are no options.
    """
    return states_ND[-1]


# Recipes read the names with `ast`, so the table must stay a dict literal.
POOLS: dict[str, Pool] = {"mean": mean, "last": last}


def pooled(states_ND: Tensor, counts: Sequence[int], pool: Pool) -> Tensor:
    """Return one vector for each row, which has `counts` of the states: (B, D)."""
    rows = [pool(row_ND) for row_ND in states_ND.split(list(counts))]
    return torch.stack(rows) if rows else states_ND[:0]


def prompt_keys(sequences: Sequences) -> Tensor:
    """Return a key of the prompt of each row with a predicted token: (B,), int64.

    Rows with the same prompt have the same key, whatever their response and their padding.
    """
    column_T = torch.arange(sequences.input_ids_BT.shape[1], device=sequences.input_ids_BT.device)
    hashed_BT = mix64(sequences.input_ids_BT + 1 + (column_T << 32))
    before_BT = sequences.response_mask_BT.cumsum(1) == 0
    keys_B = (hashed_BT * (before_BT & sequences.attention_mask_BT.bool())).sum(1)
    return mix64(keys_B)[sequences.num_predicted > 0]


def gathers() -> bool:
    """Whether this is a training step on several ranks."""
    # In an evaluation one rank may have fewer batches than another, and would not answer.
    return torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()


def gather(own_BX: Tensor) -> Tensor:
    """Return the samples of all ranks in the order of the ranks: (S, ...).

    Gradients reach this rank's samples only.  Ranks may have different numbers of samples.  Without
    gradients nothing is gathered: a held-out loss compares the samples of a rank's own batch.
    """
    if not gathers():
        return own_BX
    counts = _lengths(own_BX)
    sent_SX = own_BX.new_zeros(max(counts), *own_BX.shape[1:])
    sent_SX[: len(own_BX)] = own_BX.detach()
    received = [torch.empty_like(sent_SX) for _ in counts]
    dist.all_gather(received, sent_SX)
    parts = [part[:count] for part, count in zip(received, counts, strict=True)]
    parts[dist.get_rank()] = own_BX
    return torch.cat(parts)


def gather_together(own: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return `gather` of several tensors (B, D) with the same rows, in one exchange."""
    widths = [one.shape[1] for one in own]
    return gather(torch.cat(list(own), 1)).split(widths, dim=1)


def gathered_from(own_BX: Tensor) -> int:
    """Return the place of this rank's first sample in the result of `gather`."""
    if not gathers():
        return 0
    return sum(_lengths(own_BX)[: dist.get_rank()])


def sum_over_ranks(own: Tensor) -> Tensor:
    """Return a tensor without gradients summed over all ranks; unchanged without gradients."""
    if not gathers():
        return own
    total = own.detach().clone()
    dist.all_reduce(total)
    return total


def shared(parameter: Tensor) -> Tensor:
    """Return a parameter that all ranks use for all samples, with this rank's part of its gradient.

    Without it, the gradient would count once for each rank.
    """
    if not gathers():
        return parameter
    part = parameter / dist.get_world_size()
    return part + (parameter - part).detach()


def share_of(mean_loss: Tensor, own: int | Tensor, everyone: int | Tensor) -> Tensor:
    """Return this rank's part of a mean over the samples of all ranks, times their number: ().

    Its value is `own` times the mean, so that the ranks' values add up to `everyone` times the
    mean.  Its gradient is `everyone` times that of the mean, because each rank computes gradients
    only for its samples.
    """
    whole = mean_loss * everyone
    return whole + (mean_loss * own - whole).detach()


class PooledObjective(StateObjective):
    """Base of objectives for which a response is one vector, pooled from its predicted positions.

    A subclass implements `compare`.

    Args:
        pool: A name in `POOLS`, or a function of a response's states (N, D) that returns (D,).
        layers: As in `StateObjective`.
        weight: Factor on the objective's mean over responses: a number, or a schedule over the run.
        projector_learning_rate: As in `StateObjective`.
    """

    compares_samples = True
    least_rows: int = 2

    def __init__(
        self,
        *,
        pool: str | Pool = "mean",
        layers: Layers = LAST_LAYERS,
        weight: float | Schedule = 1.0,
        projector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(
            layers=layers, weight=weight, projector_learning_rate=projector_learning_rate
        )
        self.pool = choose("pool", pool, POOLS)

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return the number of responses with a predicted token: ()."""
        return responses(sequences)


class SampleObjective(PooledObjective):
    """Base of objectives that compare the relations of responses to each other.

    A subclass implements `relate`.  Two responses to one prompt are samples like any others: their
    relation is that of the teacher, and no two samples are taken to be unrelated.  See
    `PooledObjective` for the arguments.
    """

    def compare(self, states: Sequence[Compared], sequences: Sequences) -> Tensor:
        """Return the mean relation loss of all ranks' samples, times this rank's samples."""
        counts = tokens_of_rows(sequences, self.tokens)
        own = [pooled(side_ND, counts, self.pool) for pair in states for side_ND in pair]
        parts = gather_together(own)
        everyone = len(parts[0])
        if everyone < self.least_rows:
            return sum_of(parts[::2]) * 0.0
        pairs = zip(parts[::2], parts[1::2], strict=True)
        losses = [self.relate(mine, other) for mine, other in pairs]
        return share_of(torch.stack(losses).mean(), len(counts), everyone)

    @abc.abstractmethod
    def relate(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Return the loss of all samples together: ()."""


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of all numbers, which connects them to the loss even if they are empty: ()."""
    return torch.stack([one.sum() for one in tensors]).sum()


def _lengths(own_BX: Tensor) -> list[int]:
    """Return the number of samples of each rank."""
    own = torch.tensor([len(own_BX)], device=own_BX.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return [int(count) for count in counts]
