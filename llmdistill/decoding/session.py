"""A session: one model, one batch, and a cache from which each row can remove its last tokens.

D = heads of the cache, P = prompt tokens, B = sequences, C = cached columns, G = new tokens of each
row, H = hidden size, V = vocabulary.  Rows that keep different numbers of tokens share one
rectangular cache.  Every row appends the same columns, and the columns that a row removes become
holes, which the 2-D attention mask hides.  Positions count only a row's own tokens.  Columns at the
end that no row uses are cut off.  If too many of the rest are holes, the tokens of each row are
moved together.  The mask stays on the CPU, so that nothing about lengths must be asked of a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.batch import Prompts
from llmdistill.decoding.casts import cast_once
from llmdistill.decoding.packed import packed
from llmdistill.decoding.transfer import send
from llmdistill.errors import ModelError
from llmdistill.models.heads import Head, eval_mode, split, unwrap_adapters
from llmdistill.models.placement import at_hand
from llmdistill.models.sharding import has_sharded_weights
from llmdistill.models.vocabulary import end_ids, num_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOLES = 0.25  # share of the columns that may be holes in every row
WINDOWS = ("sliding_window", "window_size", "attention_types")  # keys of a config with a window
TRIAL_GAP = 0.05  # relative error that the trial allows; bfloat16 rounds by about 0.01
# Results of the trial.  The keys are weak, so that a model is not kept in memory by its result.
_TRIED: MutableMapping[nn.Module, bool] = weakref.WeakKeyDictionary()


class Session:
    """A model with a cache of one batch, which can read more tokens and remove the last ones.

    After construction, the cache has every prompt token except the last.  Give that one
    (`prompts.input_ids_BP[:, -1:]`) to the first `extend`; its hidden state predicts the first
    response token.  Raises ModelError if the model does not cache its tokens.

    Args:
        model: A causal LM of transformers, plain or PEFT.
        tokenizer: Its tokenizer.
        prompts: The batch, padded on the left, on the CPU.
        within: A function that makes the context in which each forward pass runs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        *,
        within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        from transformers import DynamicCache

        self.model = model
        self.device = next(model.parameters()).device
        self.ends = end_ids(model, tokenizer)
        self.num_tokens = num_tokens(tokenizer)
        self._within = within
        self._cache = DynamicCache(config=model.config.get_text_config())
        self._mask_BC = prompts.attention_mask_BP[:, :0]
        # The last prompt token is left out: a forward pass over it gives the first hidden state.
        ids_BP, mask_BP = prompts.input_ids_BP[:, :-1], prompts.attention_mask_BP[:, :-1]
        if not ids_BP.shape[1] and has_sharded_weights(model):
            # Other ranks make this pass, so this one reads a column that its mask hides.
            ids_BP, mask_BP = prompts.input_ids_BP, torch.zeros_like(prompts.attention_mask_BP)
        if ids_BP.shape[1]:
            self._read(ids_BP, mask_BP)

    @property
    def length_B(self) -> Tensor:
        """Number of cached tokens of each row, prompt included: (B,), on the CPU."""
        return self._mask_BC.sum(1)

    @property
    def head(self) -> Head:
        """The head that turns the hidden states from `extend` into logits."""
        return split(self.model)[1]

    @property
    def can_hold_holes(self) -> bool:
        """Whether rows can keep different numbers of tokens, and remove some."""
        return can_hold_holes(self.model)

    def extend(self, ids_BG: Tensor, last_position_B: Tensor | None = None) -> Tensor:
        """Read G more tokens of every row and return their final hidden states: (B, G, H).

        Tokens beyond a row's `last_position_B` (on the CPU), which the caller must remove later,
        are read at that position, because a model with learned positions has no others.
        """
        mask_BG = torch.ones(ids_BG.shape, dtype=self._mask_BC.dtype)
        return self._read(ids_BG, mask_BG, last_position_B)

    @torch.no_grad()
    def logits(self, hidden_BGH: Tensor) -> Tensor:
        """Return the logits of hidden states from `extend`: (B, G, V), float32.

        V counts only the ids that the tokenizer uses.
        """
        output = unwrap_adapters(self.model).get_output_embeddings()
        with self._within():
            products_BGV = output(hidden_BGH)  # The module itself, because it may be packed.
        # The module has already added the bias.
        logits_BGV = replace(self.head, bias_V=None).finish(products_BGV)
        return logits_BGV[..., : self.num_tokens].float()

    def keep(self, length_B: Tensor) -> None:
        """Remove all tokens of each row after its first `length_B` ones, a tensor on the CPU.

        Raises ModelError if tokens must be removed but the model does not allow it
        (`can_hold_holes`).
        """
        position_BC = self._mask_BC.cumsum(1)
        self._mask_BC = self._mask_BC * (position_BC <= length_B[:, None])
        used_C = self._mask_BC.any(0)
        unused = len(used_C) - int(used_C.nonzero().max()) - 1 if used_C.any() else len(used_C)
        left_BC = self._mask_BC[:, : len(used_C) - unused]
        # Holes are zeros after a one.  The zeros of left padding come before all ones.
        holes = bool((left_BC[:, 1:] < left_BC[:, :-1]).any())
        if (unused or holes) and not self.can_hold_holes:
            raise ModelError(
                f"{type(unwrap_adapters(self.model)).__name__} cannot remove tokens from its "
                "cache: it has layers that count cache columns (a window, a recurrent state or a "
                "bias by distance). Use block size 1."
            )
        if unused:
            self._cache.crop(-unused)
            self._mask_BC = left_BC
        if holes:
            self._close_up()

    def drop(self, rows: Tensor) -> None:
        """Remove the rows at these indices, a tensor on the CPU; the others keep their order."""
        stay = torch.ones(len(self._mask_BC), dtype=torch.bool)
        stay[rows] = False
        # `reorder_cache` also moves the states of layers that do not attend (in hybrid models).
        self._cache.reorder_cache(send(stay.nonzero()[:, 0], self.device))
        self._mask_BC = self._mask_BC[stay]

    def _close_up(self) -> None:
        """Move each row's tokens together, to the right, if too many columns are holes."""
        width, longest = self._mask_BC.shape[1], int(self.length_B.max())
        if width - longest <= HOLES * width:
            return
        # A stable sort puts the holes first and keeps the order of the tokens.  The first columns
        # are then holes in every row, and are cut off.
        order_BC = self._mask_BC.argsort(dim=1, stable=True)[:, width - longest :]
        self._mask_BC = self._mask_BC.gather(1, order_BC)
        order_BC = send(order_BC, self.device)
        for layer in self._cache.layers:
            here_BC = order_BC.to(layer.keys.device)  # layers may be on several GPUs
            layer.keys = _columns(layer.keys, here_BC)
            layer.values = _columns(layer.values, here_BC)

    def _holds(self, num_columns: int) -> bool:
        """Whether the model has put its tokens into the cache that it was given."""
        # A model without attention (Mamba) keeps a state instead, which cannot forget a token.
        from transformers.cache_utils import DynamicLayer

        attends = any(isinstance(layer, DynamicLayer) for layer in self._cache.layers)
        return attends and self._cache.get_seq_length() == num_columns

    @torch.no_grad()
    def _read(
        self, ids_BG: Tensor, mask_BG: Tensor, last_position_B: Tensor | None = None
    ) -> Tensor:
        # Columns are not positions: holes and padding do not count.
        position_BG = (self.length_B[:, None] + mask_BG.cumsum(1) - 1).clamp_min(0)
        if last_position_B is not None:
            position_BG = position_BG.minimum(last_position_B[:, None])
        self._mask_BC = torch.cat([self._mask_BC, mask_BG], dim=1)
        with self._within():
            backbone, _ = split(self.model)
            output = backbone(
                input_ids=send(ids_BG, self.device),
                attention_mask=send(self._mask_BC, self.device),
                position_ids=send(position_BG, self.device),
                past_key_values=self._cache,
                use_cache=True,
            )
        if not self._holds(self._mask_BC.shape[1]):
            raise ModelError(
                f"{type(unwrap_adapters(self.model)).__name__} does not keep its tokens in a "
                "key-value cache, so it cannot take part in an interleaved rollout. Use "
                "rollout.kind: sampled."
            )
        return output.last_hidden_state


@contextlib.contextmanager
def session(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[Session]:
    """Open a Session of a model that is ready to write, and restore the model afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(at_hand(model))
        # Packed inside `within`, because its autocast decides the dtype that layers are packed for.
        with within():
            stack.enter_context(ready_to_write(model, len(prompts)))
        yield Session(model, tokenizer, prompts, within=within)


@contextlib.contextmanager
def ready_to_write(model: PreTrainedModel, batch_size: int) -> Iterator[None]:
    """Put a model in eval mode, with packed layers and weights that are cast once.

    `torch.compile` is off, because shapes change with every token.
    """
    eager = torch.compiler.set_stance("force_eager")
    with eval_mode(model), packed(model, batch_size), cast_once(model), eager:
        yield


def can_hold_holes(model: PreTrainedModel) -> bool:
    """Whether the model continues correctly after columns that are masked.

    It is tried once for each model, with numbers, because biases by distance do not show in every
    configuration.
    """
    # Windows are found in the configuration instead, because they may be longer than any trial.
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if any(kind != "full_attention" for kind in kinds) or any(
        getattr(config, name, None) is not None for name in WINDOWS
    ):
        return False
    if model not in _TRIED:
        _TRIED[model] = _reads_on_behind_holes(model)
    return _TRIED[model]


@torch.no_grad()
def _reads_on_behind_holes(model: PreTrainedModel) -> bool:
    """Whether a pass over masked columns equals one in which their tokens never existed.

    It reads 11 tokens, masks 8 of them, and reads 2 more.
    """
    from transformers import DynamicCache

    backbone, config = split(model)[0], model.config.get_text_config()
    device = next(model.parameters()).device
    ids_1C = (torch.arange(13, device=device) % config.vocab_size)[None]
    mask_1C = torch.ones_like(ids_1C)
    mask_1C[:, 3:11] = 0
    position_1C = mask_1C.cumsum(1) - 1
    cache = DynamicCache(config=config)
    with eval_mode(model):
        options: Any = {"past_key_values": cache, "use_cache": True}
        first = {"input_ids": ids_1C[:, :11], "position_ids": torch.arange(11, device=device)[None]}
        backbone(**first, attention_mask=torch.ones_like(mask_1C[:, :11]), **options)
        rest = {"input_ids": ids_1C[:, 11:], "position_ids": position_1C[:, 11:]}
        found = backbone(**rest, attention_mask=mask_1C, **options).last_hidden_state
        alone = ids_1C[mask_1C.bool()][None]
        expected = backbone(input_ids=alone, use_cache=False).last_hidden_state[:, -2:]
    gap = (found - expected).float().abs().mean() / expected.float().abs().mean()
    return bool(gap < TRIAL_GAP)


def _columns(states_BDCH: Tensor, order_BC: Tensor) -> Tensor:
    """Return the chosen columns of each row, in this order: (B, D, C, H)."""
    # The size is taken from the states, because values may have another one than keys.
    _, heads, _, size = states_BDCH.shape
    return states_BDCH.gather(2, order_BC[:, None, :, None].expand(-1, heads, -1, size))
