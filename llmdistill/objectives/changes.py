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

from llmdistill.batch import Embed, Sequences, widened
from llmdistill.models.hashing import mix64
from llmdistill.objectives.samples import gather, gathered_from, gathers
from llmdistill.protocols import Progress


def change_keys(progress: Progress, row_ids_B: Tensor) -> Tensor:
    """Return a key for the changes of each row in this step: (B,), int64."""
    keys_B = torch.full_like(row_ids_B, progress.seed)
    for part in (progress.step, row_ids_B):
        keys_B = mix64(keys_B ^ mix64(torch.as_tensor(part, device=keys_B.device) + 1))
    return keys_B


def _generators(progress: Progress, sequences: Sequences) -> Iterator[tuple[int, torch.Generator]]:
    """Yield each row's number of tokens, and a generator on the device of the sequences."""
    device = sequences.row_ids_B.device
    keys = change_keys(progress, sequences.row_ids_B).tolist()
    lengths = sequences.attention_mask_BT.sum(1).tolist()
    for key, length in zip(keys, lengths, strict=True):
        yield length, torch.Generator(device).manual_seed(key)


# ---- dropped tokens ----


def dropped(sequences: Sequences, rate: float, progress: Progress) -> Sequences:
    """Return the sequences with a change that sets the embeddings of some tokens to 0.

    Each token of prompt and response but the first is dropped with probability `rate`.  It is still
    predicted.  The first is kept, because a state that has read nothing is 0 in each layer, and the
    gradient of its norms would overflow.
    """
    mask_BT = sequences.attention_mask_BT.bool()
    kept_BT = torch.ones(mask_BT.shape, device=mask_BT.device)
    for row, (length, generator) in enumerate(_generators(progress, sequences)):
        drawn_T = torch.rand(length, generator=generator, device=mask_BT.device)
        kept_T = (drawn_T >= rate).float()
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
    lengths, and which row of an odd number is alone and its own partner.
    """
    by_key_S = keys_S.argsort()
    partner_S, paired = torch.arange(len(keys_S), device=keys_S.device), by_key_S
    if len(keys_S) % 2:
        paired = by_key_S[1:]
    order = paired[lengths_S[paired].argsort(stable=True)]
    partner_S[order] = order[torch.arange(len(order), device=order.device) ^ 1]
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
    width = torch.tensor(sequences.input_ids_BT.shape[1], device=sequences.row_ids_B.device)
    if gathers():
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
    parts = (
        sequences.input_ids_BT,
        sequences.attention_mask_BT,
        sequences.response_mask_BT.long(),
        sequences.writer_BT,
    )
    all_ST4 = gather(torch.stack([widened(part, int(width)) for part in parts], dim=-1))
    rows_S = gather(sequences.row_ids_B)
    partner_S = torch.arange(len(rows_S), device=rows_S.device)
    _, attention_ST, response_ST, _ = all_ST4.unbind(-1)
    real = response_ST[:, 1:].any(1).nonzero()[:, 0]
    keys_S = change_keys(progress, rows_S)
    partner_S[real] = real[partners(attention_ST[real].sum(1), keys_S[real])]
    start = gathered_from(sequences.row_ids_B)
    own_B = partner_S[start : start + len(sequences)]
    ids_BT, attention_BT, response_BT, writer_BT = all_ST4[own_B].unbind(-1)
    return Sequences(ids_BT, attention_BT, response_BT.bool(), rows_S[own_B], writer_BT)


def mixed(sequences: Sequences, other: Sequences, share_B: Tensor) -> Sequences:
    """Return the mixture of each row with its partner.

    Both models read share * own + (1 - share) * other, each with its own embeddings.  A row that
    has ended adds 0.  A token is predicted if one of the rows predicts it, and its label is the
    row's own if it can be.  A partner without a share is left out.
    """
    width = max(sequences.input_ids_BT.shape[1], other.input_ids_BT.shape[1])
    takes_part_B1 = (share_B < 1)[:, None]
    ids_BT, other_ids_BT = (widened(one.input_ids_BT, width) for one in (sequences, other))
    reads_BT, other_reads_BT = (
        widened(one.attention_mask_BT, width).bool() for one in (sequences, other)
    )
    predicts_BT, other_predicts_BT = (
        widened(one.response_mask_BT, width) for one in (sequences, other)
    )
    other_reads_BT, other_predicts_BT = (
        one_BT & takes_part_B1 for one_BT in (other_reads_BT, other_predicts_BT)
    )

    def change(embed: Embed, labels_BT: Tensor) -> Tensor:
        def part(taken_BT: Tensor, share_B: Tensor, reads_BT: Tensor) -> Tensor:
            embedded_BTH = embed(taken_BT.to(labels_BT.device))
            return embedded_BTH * (share_B[:, None] * reads_BT)[..., None].to(embedded_BTH)

        own_BTH = part(ids_BT, share_B, reads_BT)
        return own_BTH + part(other_ids_BT, 1 - share_B, other_reads_BT)

    lends_BT = other_predicts_BT & ~predicts_BT
    writer_BT, other_writer_BT = (widened(one.writer_BT, width) for one in (sequences, other))
    return Sequences(
        torch.where(lends_BT, other_ids_BT, ids_BT),
        (reads_BT | other_reads_BT).long(),
        predicts_BT | other_predicts_BT,
        sequences.row_ids_B,
        torch.where(lends_BT, other_writer_BT, writer_BT),
        embedding_change=change,
    )


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
        mask_BT, width = sequences.attention_mask_BT.bool(), shape[-1]
        begun_BTH = torch.zeros(shape, device=mask_BT.device)
        for row, (length, generator) in enumerate(_generators(progress, sequences)):
            drawn_TH = torch.rand(length, width, generator=generator, device=mask_BT.device)
            begun_BTH[row, mask_BT[row]] = (2 * drawn_TH - 1) / width**0.5
        return begun_BTH

    return start
