"""Keyed randomness: a drawn token does not depend on the time or on the other rows of the batch.

M = likeliest tokens, N = numbers drawn, B = sequences, V = vocabulary.  A token is drawn as the
argmax of its warped log-probability plus Gumbel noise (the Gumbel-max trick, which gives an exact
sample of the distribution).  The noise is a hash of seed, row, sample, epoch, slot, writer and
token id.  So a row gets the same tokens in any batch, on any number of ranks and after a resume.
The uniform numbers have 24 bits, so a token with a probability below 2^-24 is drawn slightly too
often or too rarely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmdistill.decoding.transfer import waits
from llmdistill.models.hashing import mix64
from llmdistill.sampling import Draw, Sampling, Writer

BLOCK_ROWS = 4  # rows hashed at a time: three times faster on a CPU, because they fit its cache
NUCLEUS_TOKENS = 256  # number of likeliest tokens that are searched first for the edge of top-p


def row_keys(draw: Draw, row_ids_B: Tensor, writer: Writer) -> Tensor:
    """Return a 64-bit key for each row, the same for all of its slots: (B,), int64."""
    # The key is mixed after each part, so that swapped parts give different keys.
    keys_B = torch.full_like(row_ids_B, draw.seed)
    for part in (row_ids_B, draw.sample, draw.epoch, int(writer)):
        keys_B = mix64(keys_B ^ (mix64(torch.as_tensor(part, device=keys_B.device) + 1)))
    return keys_B


def gumbel(keys_B: Tensor, slot_B: Tensor | int, num_tokens: int) -> Tensor:
    """Return standard Gumbel noise for every token at a slot of each row: (B, V), float32."""
    if not isinstance(slot_B, Tensor):  # filled in on the device, so that nothing is copied there
        slot_B = torch.full_like(keys_B, slot_B)
    slot_keys_B = mix64(keys_B + mix64(slot_B + 1))
    # Both halves of a slot's 64-bit key go into the 32-bit hash of each token.
    low_B1 = (slot_keys_B & 0xFFFFFFFF).to(torch.int32)[:, None]
    high_B1 = (slot_keys_B >> 32).to(torch.int32)[:, None]
    tokens_V = torch.arange(num_tokens, dtype=torch.int32, device=keys_B.device) * -1640531527
    noise_BV = torch.empty(len(keys_B), num_tokens, device=keys_B.device)
    step = BLOCK_ROWS if keys_B.device.type == "cpu" else len(keys_B)
    for start in range(0, len(keys_B), step):
        rows = slice(start, start + step)
        bits_nV = _mix32(tokens_V + low_B1[rows], high_B1[rows])
        # The largest 24 bits would round up to 1, and its noise would be infinite.
        uniform_nV = noise_BV[rows].copy_(bits_nV).add_(0.5).mul_(2.0**-24).clamp_(max=1 - 2.0**-24)
        uniform_nV.log_().neg_().log_().neg_()  # -log(-log(u)), in place
    return noise_BV


def cut_away(logits_BV: Tensor, sampling: Sampling) -> Tensor | None:
    """Return a mask, True at the tokens that top-k and then top-p remove: (B, V).

    It is None if the settings remove nothing.  The likeliest token is always kept.  If tokens tie
    at an edge, all of them are kept.
    """
    has_top_k = 0 < sampling.top_k < logits_BV.shape[-1]
    if not has_top_k and sampling.top_p >= 1.0:
        return None
    scores_BV = logits_BV.float() / sampling.temperature
    if has_top_k:
        edge_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < edge_B1, -torch.inf)
    if sampling.top_p < 1.0:
        scores_BV = scores_BV.masked_fill(
            scores_BV < _nucleus_edge(scores_BV, sampling.top_p), -torch.inf
        )
    return scores_BV == -torch.inf


def _nucleus_edge(scores_BV: Tensor, top_p: float) -> Tensor:
    """Return the lowest score in each row's nucleus: (B, 1).

    The nucleus is the smallest set of likeliest tokens with a total probability of top_p.  A few
    hundred tokens nearly always have that probability.  Only the other rows are sorted completely,
    which is ten times slower over 49,152 tokens on a CPU.  A GPU sorts all rows, because asking
    which ones are left takes longer.
    """
    if waits(scores_BV.device):
        return _edge_within(scores_BV, top_p, scores_BV.shape[-1])[0]
    edge_B1, mass_B = _edge_within(scores_BV, top_p, min(NUCLEUS_TOKENS, scores_BV.shape[-1]))
    wide_n = (mass_B < top_p).nonzero()[:, 0]
    if len(wide_n):
        edge_B1[wide_n] = _edge_within(scores_BV[wide_n], top_p, scores_BV.shape[-1])[0]
    return edge_B1


def _edge_within(scores_BV: Tensor, top_p: float, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the edge of the nucleus within the likeliest tokens, and their total probability.

    Shapes: (B, 1) and (B,).  The edge is right only if that probability is at least top_p.
    """
    top_BM = scores_BV.topk(num_tokens).values
    probability_BM = (top_BM - scores_BV.logsumexp(-1, keepdim=True)).exp()
    # The total probability of all likelier tokens: 0 for the first, which is therefore kept.
    before_BM = probability_BM.cumsum(-1) - probability_BM
    inside_BM = before_BM < top_p
    # A row with a NaN has no token inside; the clamp keeps its index valid.
    last_B1 = (inside_BM.sum(-1, keepdim=True) - 1).clamp_min(0)
    edge_B1 = top_BM.gather(-1, last_B1)
    return edge_B1, probability_BM.sum(-1)


def perturb(logits_BV: Tensor, sampling: Sampling, keys_B: Tensor, slot_B: Tensor | int) -> Tensor:
    """Return scores whose argmax is the drawn token: (B, V), float32.

    They are logits / temperature plus noise, or the logits themselves at temperature 0.
    """
    # The softmax's normaliser is the same for all tokens of a row, so it can be left out.
    if sampling.temperature == 0:
        return logits_BV.float()
    noise_BV = gumbel(keys_B, slot_B, logits_BV.shape[-1])
    scores_BV = noise_BV.add_(logits_BV.float(), alpha=1 / sampling.temperature)
    cut_BV = cut_away(logits_BV, sampling)
    return scores_BV if cut_BV is None else scores_BV.masked_fill_(cut_BV, -torch.inf)


def draw_tokens(
    logits_BV: Tensor, sampling: Sampling, keys_B: Tensor, slot_B: Tensor | int
) -> Tensor:
    """Return the drawn token of each row at a slot: (B,).

    Temperature 0 gives the likeliest token.
    """
    return perturb(logits_BV, sampling, keys_B, slot_B).argmax(-1)


def log_prob(logits_NV: Tensor, sampling: Sampling, token_N: Tensor) -> Tensor:
    """Return the log-probability with which the sampler draws each token: (N,), in nats, float32.

    It is -inf for a token that the sampler never draws.
    """
    if sampling.temperature == 0:
        return torch.where(logits_NV.argmax(-1) == token_N, 0.0, -torch.inf)
    scores_NV = logits_NV.float() / sampling.temperature
    cut_NV = cut_away(logits_NV, sampling)
    if cut_NV is not None:
        scores_NV = scores_NV.masked_fill(cut_NV, -torch.inf)
    return scores_NV.gather(-1, token_N[:, None])[:, 0] - scores_NV.logsumexp(-1)


def coin(keys_B: Tensor, slot_B: Tensor | int) -> Tensor:
    """Return a uniform number in (0, 1) for a slot of each row: (B,)."""
    # exp(-exp(-g)) recovers the uniform number from which the noise g was made.
    return gumbel(keys_B, slot_B, 1)[:, 0].neg().exp().neg().exp()


def _mix32(x: Tensor, key: Tensor) -> Tensor:
    """Return 24 bits of murmur3's finaliser on int32, with a key mixed in halfway.

    The result is in [0, 2^24).  `x` is overwritten.
    """
    shifted = (x >> 16) & 0xFFFF
    x = x.bitwise_xor_(shifted).mul_(-2048144789).bitwise_xor_(key)
    torch.bitwise_right_shift(x, 13, out=shifted).bitwise_and_(0x7FFFF)
    x = x.bitwise_xor_(shifted).mul_(-1028477387)
    torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)
    return x.bitwise_xor_(shifted).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
