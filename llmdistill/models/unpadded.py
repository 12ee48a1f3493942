"""Forward passes without padding: all sequences of a batch in one row.

B = sequences, T = tokens, S = tokens of all sequences, H = hidden size.

It needs an attention that takes the lengths of the sequences, and a model in which nothing else
reads across them.  The first is known from the attention, and the second is tried once for each
model: recurrent and convolutional layers do not stop at the end of a sequence.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.models.heads import eval_mode, split
from llmdistill.models.kernels import takes_lengths

TRIAL_GAP = 0.05  # relative error that the trial allows; bfloat16 rounds by about 0.01
# Results of the trial by attention.  The keys are weak, so that they do not keep a model in memory.
_TRIED: MutableMapping[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def states_without_padding(backbone: Any, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the final hidden states of all tokens except padding, row by row: (1, S, H)."""
    real_BT = mask_BT.bool()
    length_B = real_BT.sum(1)
    ends = nn.functional.pad(length_B.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(length_B.max())
    output = backbone(
        input_ids=input_ids_BT[real_BT][None],
        # Without a mask, transformers takes position 0 for the start of a sequence.
        position_ids=(real_BT.cumsum(1) - 1)[real_BT][None],
        use_cache=False,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=longest,
    )
    return output.last_hidden_state


def reads_without_padding(model: Any) -> bool:
    """Whether a model gives the states of `states_without_padding` as in a padded batch."""
    backbone: Any = split(model)[0]
    if not takes_lengths(backbone) or not _takes_more(backbone):
        return False
    # NEFTune's hook scales its noise by the length of a row, which would be that of the batch.
    if hasattr(backbone.get_input_embeddings(), "neftune_noise_alpha"):
        return False
    tried = _TRIED.setdefault(backbone, {})
    name = backbone.config._attn_implementation
    if name not in tried:
        tried[name] = _keeps_apart(backbone)
    return tried[name]


def _takes_more(backbone: nn.Module) -> bool:
    """Whether the forward pass of a backbone hands keywords that it does not know to its layers."""
    known = inspect.signature(backbone.forward).parameters.values()
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known)


@torch.no_grad()
def _keeps_apart(backbone: Any) -> bool:
    """Whether the second of two texts in one row has the states that it has alone."""
    weight = backbone.get_input_embeddings().weight
    ids_BT = (torch.arange(16, device=weight.device) % backbone.config.vocab_size).view(2, 8)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 6:] = 0
    # Decoder layers may be compiled, which would take longer than the trial.
    with eval_mode(backbone), torch.compiler.set_stance("force_eager"):
        found = states_without_padding(backbone, ids_BT, mask_BT)[0, 6:]
        expected = backbone(input_ids=ids_BT[1:], use_cache=False).last_hidden_state[0]
    gap = (found - expected).float().abs().mean() / expected.float().abs().mean()
    return bool(gap < TRIAL_GAP)
