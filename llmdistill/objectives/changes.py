"""Changes of what both models read: mixed rows, dropped tokens, and worst perturbations.

B = rows of this rank, S = rows of all ranks, T = tokens, H = hidden size.  All randomness follows
from the seed, the step and the id of the row.  So a row is changed the same in any micro-batch, on
any number of ranks and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from llmdistill.batch import Embed, Sequences
from llmdistill.models.hashing import mix64
from llmdistill.objectives.samples import gather, gathered_from, gathers
from llmdistill.protocols import Progress
from llmdistill.sampling import Writer


def change_keys(progress: Progress, row_ids_B: Tensor) -> Tensor:
    """Return a key for the changes of each row in this step: (B,), int64."""
    keys_B = torch.full_like(row_ids_B, progress.seed)
    for part in (progress.step, row_ids_B):
        keys_B = mix64(keys_B ^ mix64(torch.as_tensor(part, device=keys_B.device) + 1))
    return keys_B


def _generators(progress: Progress, sequences: Sequences) -> Iterator[tuple[int, torch.Generator]]:
    """Yield each row's number of tokens, and a generator on the CPU."""
    keys = change_keys(progress, sequences.row_ids_B).tolist()
    lengths = sequences.attention_mask_BT.sum(1).tolist()
    for key, length in zip(keys, lengths, strict=True):
        yield length, torch.Generator().manual_seed(key)


# ---- dropped tokens ----


def dropped(sequences: Sequences, rate: float, progress: Progress) -> Sequences:
    """Return the sequences with a change that sets the embeddings of some tokens to 0.

    Each token of prompt and response but the first is dropped with probability `rate`.  It is still
    predicted.  The first is kept, because a state that has read nothing is 0 in each layer, and the
    gradient of its norms would overflow.
    """
    kept_BT = torch.ones(sequences.input_ids_BT.shape)
    mask_BT = sequences.attention_mask_BT.bool().cpu()
    for row, (length, generator) in enumerate(_generators(progress, sequences)):
        kept_T = (torch.rand(length, generator=generator) >= rate).float()
        kept_T[:1] = 1.0
        kept_BT[row, mask_BT[row]] = kept_T

    def change(embed: Embed, ids_BT: Tensor) -> Tensor:
        embedded_BTH = embed(ids_BT)
        return embedded_BTH * kept_BT[..., None].to(embedded_BTH)

    return replace(sequences, embedding_change=change, signal=None)


# ---- mixed rows ----


def partners(lengths_S: Tensor, keys_S: Tensor) -> Tensor:
    """Return the partner of each row, of similar length: (S,).

    Two neighbours in the order of length are each other's partner.  Keys decide between equal
    lengths.  The last row of an odd number is alone, and is its own partner.
    """
    by_key_S = keys_S.argsort()
    order_S = by_key_S[lengths_S[by_key_S].argsort(stable=True)]
    neighbour_S = torch.arange(len(order_S), device=order_S.device) ^ 1
    neighbour_S = neighbour_S.clamp_max(len(order_S) - 1)
    partner_S = torch.empty_like(order_S)
    partner_S[order_S] = order_S[neighbour_S]
    return partner_S


def shares(keys_B: Tensor, alpha: float) -> Tensor:
    """Return the share of each row in its mixture: (B,), at least 0.5, float32.

    max(u, 1 - u) with u ~ Beta(alpha, alpha).
    """
    drawn = [random.Random(key).betavariate(alpha, alpha) for key in keys_B.tolist()]
    return torch.tensor([max(one, 1 - one) for one in drawn], device=keys_B.device)


def partners_of(sequences: Sequences, progress: Progress) -> Sequences:
    """Return the partner of each of this rank's rows, chosen among the rows of all ranks.

    Rows without a predicted token are nobody's partner but their own.
    """
    ids_ST, attention_ST, response_ST = (
        gather(_as_wide(one_BT))
        for one_BT in (
            sequences.input_ids_BT,
            sequences.attention_mask_BT,
            sequences.response_mask_BT.long(),
        )
    )
    rows_S = gather(sequences.row_ids_B)
    partner_S = torch.arange(len(rows_S), device=rows_S.device)
    real = response_ST[:, 1:].any(1).nonzero()[:, 0]
    keys_S = change_keys(progress, rows_S)
    partner_S[real] = real[partners(attention_ST[real].sum(1), keys_S[real])]
    start = gathered_from(sequences.row_ids_B)
    own_B = partner_S[start : start + len(sequences)]
    writer_BT = torch.full_like(ids_ST[own_B], int(Writer.DATA))
    parts = (ids_ST[own_B], attention_ST[own_B], response_ST[own_B].bool(), rows_S[own_B])
    return Sequences(*parts, writer_BT)


def mixed(sequences: Sequences, other: Sequences, share_B: Tensor) -> Sequences:
    """Return the mixture of each row with its partner.

    Both models read share * own + (1 - share) * other, each with its own embeddings, where a token
    that only one of the rows has counts alone.  A token is predicted if one of them predicts it.  A
    partner without a share is left out.
    """
    width = max(sequences.input_ids_BT.shape[1], other.input_ids_BT.shape[1])
    ids_BT, other_ids_BT, writer_BT = (
        _widened(one, width)
        for one in (sequences.input_ids_BT, other.input_ids_BT, sequences.writer_BT)
    )
    takes_part_B1 = (share_B < 1)[:, None]
    own_BT, other_BT = (_widened(one.attention_mask_BT, width).bool() for one in (sequences, other))
    other_BT = other_BT & takes_part_B1
    own_response_BT, other_response_BT = (
        _widened(one.response_mask_BT, width) for one in (sequences, other)
    )

    def change(embed: Embed, own_ids_BT: Tensor) -> Tensor:
        mine_BTH, their_BTH = embed(own_ids_BT), embed(other_ids_BT.to(own_ids_BT.device))
        share_B11 = share_B[:, None, None].to(mine_BTH)
        mine_BTH = mine_BTH * own_BT[..., None].to(mine_BTH)
        their_BTH = their_BTH * other_BT[..., None].to(their_BTH)
        return share_B11 * mine_BTH + (1 - share_B11) * their_BTH

    return Sequences(
        ids_BT,
        (own_BT | other_BT).long(),
        own_response_BT | other_response_BT & takes_part_B1,
        sequences.row_ids_B,
        writer_BT,
        embedding_change=change,
    )


def _as_wide(own_BT: Tensor) -> Tensor:
    """Return a tensor padded to the width of the widest rank."""
    width = torch.tensor(own_BT.shape[1], device=own_BT.device)
    if gathers():
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
    return _widened(own_BT, int(width))


def _widened(own_BT: Tensor, width: int) -> Tensor:
    return pad(own_BT, (0, width - own_BT.shape[1]))


# ---- perturbations ----


class Perturbation:
    """A small change of the embeddings that one model reads, moved to where a loss is large.

    Each token's change is at most `epsilon` times as long as its embedding.  Padding is not
    changed, because no loss depends on it.  Use it as `Sequences.embedding_change`, then `climb`
    with the loss.

    Args:
        epsilon: The longest change, as a share of the length of the embedding.
        start: A function of the shape (B, T, H) that returns where the change starts, in units of
            its longest length; None is 0.
    """

    def __init__(
        self, epsilon: float, start: Callable[[tuple[int, ...]], Tensor] | None = None
    ) -> None:
        self.epsilon, self.start = epsilon, start
        self.change_BTH: Tensor | None = None

    def __call__(self, embed: Embed, ids_BT: Tensor) -> Tensor:
        embedded_BTH = embed(ids_BT)
        if self.change_BTH is None:
            self.change_BTH = self._begin(embedded_BTH.detach().float())
        return embedded_BTH + self.change_BTH.to(embedded_BTH.dtype)

    def _begin(self, embedded_BTH: Tensor) -> Tensor:
        self.longest_BT1 = self.epsilon * embedded_BTH.norm(dim=-1, keepdim=True)
        begun_BTH = torch.zeros_like(embedded_BTH)
        if self.start is not None:
            begun_BTH = self.longest_BT1 * self.start(embedded_BTH.shape).to(begun_BTH)
        return begun_BTH.requires_grad_()

    def climb(self, total: Tensor, step: float) -> None:
        """Move each token's change along the gradient of a loss, by `step` of its longest length.

        Gradients of parameters are neither computed nor changed.
        """
        assert self.change_BTH is not None
        (slope_BTH,) = torch.autograd.grad(total, self.change_BTH, materialize_grads=True)
        length_BT1 = slope_BTH.norm(dim=-1, keepdim=True)
        way_BTH = slope_BTH / length_BT1.clamp_min(torch.finfo(length_BT1.dtype).tiny)
        moved_BTH = self.change_BTH.detach() + step * self.longest_BT1 * way_BTH
        length_BT1 = moved_BTH.norm(dim=-1, keepdim=True).clamp_min(
            torch.finfo(length_BT1.dtype).tiny
        )
        shrunk_BTH = moved_BTH * (self.longest_BT1 / length_BT1).clamp_max(1.0)
        self.change_BTH = shrunk_BTH.requires_grad_()

    def stay(self) -> None:
        """Take part in no gradient from here on."""
        assert self.change_BTH is not None
        self.change_BTH = self.change_BTH.detach()


def random_start(sequences: Sequences, progress: Progress) -> Callable[[tuple[int, ...]], Tensor]:
    """Return a function that draws a start of `Perturbation`, uniform in a cube within the ball."""

    def start(shape: tuple[int, ...]) -> Tensor:
        begun_BTH, width = torch.zeros(shape), shape[-1]
        mask_BT = sequences.attention_mask_BT.bool().cpu()
        for row, (length, generator) in enumerate(_generators(progress, sequences)):
            drawn_TH = torch.rand(length, width, generator=generator)
            begun_BTH[row, mask_BT[row]] = (2 * drawn_TH - 1) / width**0.5
        return begun_BTH

    return start
