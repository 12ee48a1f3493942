"""One model, one batch, and a cache that can take tokens back.

B = sequences, C = cached columns, G = new tokens a row, H = hidden size, V = vocabulary.  Rows that
keep different numbers of tokens stay in one rectangular cache: every row appends the same columns,
and those that a row gives back become holes, masked by the 2-D attention mask.  Positions count a
row's own tokens.  Columns that no row uses any more are cut off the end, and where too many are
holes the rows move together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmdistill.batch import Prompts
from llmdistill.decoding.packed import packed
from llmdistill.errors import ModelError
from llmdistill.models.heads import Head, eval_mode, split, unwrap_adapters
from llmdistill.models.vocabulary import end_ids, num_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOLES = 0.25  # share of the columns that may be holes in every row


class Session:
    """A model that reads a batch token by token and can forget its last ones, row by row.

    After construction the cache holds every prompt token but the last; the first `extend` takes
    that one (`prompts.input_ids_BP[:, -1:]`), and its hidden state predicts the first response
    token.  `within` makes the context that each pass of the model runs in.
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
        config = model.config.get_text_config()
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * windowed
        self.can_hold_holes = all(kind == "full_attention" for kind in kinds)
        self._window = getattr(config, "sliding_window", None) or 0
        self._cache = DynamicCache(config=config)
        self._mask_BC = prompts.attention_mask_BP[:, :0].to(self.device)
        ids_BP = prompts.input_ids_BP.to(self.device)
        if ids_BP.shape[1] > 1:
            self._read(ids_BP[:, :-1], prompts.attention_mask_BP[:, :-1].to(self.device))

    @property
    def length_B(self) -> Tensor:
        """Tokens that the cache holds for each row, prompt included: (B,)."""
        return self._mask_BC.sum(1)

    @property
    def head(self) -> Head:
        """What turns the hidden states that `extend` gives into logits."""
        return split(self.model)[1]

    def extend(self, ids_BG: Tensor) -> Tensor:
        """Reads G more tokens of every row and gives their final hidden states: (B, G, H)."""
        return self._read(ids_BG.to(self.device), torch.ones_like(ids_BG, device=self.device))

    @torch.no_grad()
    def logits(self, hidden_BGH: Tensor) -> Tensor:
        """What `extend` gave, as scores of the ids that have a meaning: (B, G, V), float32."""
        output = unwrap_adapters(self.model).get_output_embeddings()
        with self._within():
            products_BGV = output(hidden_BGH)  # the module: it may be packed
        logits_BGV = replace(self.head, bias_V=None).finish(products_BGV)
        return logits_BGV[..., : self.num_tokens].float()

    def keep(self, length_B: Tensor) -> None:
        """Forgets what each row holds beyond its first `length_B` tokens.

        Raises ModelError if that leaves holes in a model whose layers count columns (sliding
        window).
        """
        position_BC = self._mask_BC.cumsum(1)
        self._mask_BC = self._mask_BC * (position_BC <= length_B.to(self.device)[:, None])
        used_C = self._mask_BC.any(0)
        unused = len(used_C) - int(used_C.nonzero().max()) - 1 if used_C.any() else len(used_C)
        left_BC = self._mask_BC[:, : len(used_C) - unused]
        holes = bool((left_BC[:, 1:] < left_BC[:, :-1]).any())
        if not self.can_hold_holes and (holes or (unused and len(used_C) >= self._window)):
            raise ModelError(
                f"{type(self.model).__name__} has layers that count columns (sliding window or "
                "recurrent): what has left the window cannot come back, and rows cannot keep "
                "different lengths in one cache. Use block size 1."
            )
        if unused:
            self._cache.crop(-unused)
            self._mask_BC = left_BC
        if holes:
            self._close_up()

    def drop(self, rows: Tensor) -> None:
        """Takes these rows out of the batch; the others close up."""
        stay = torch.ones(len(self._mask_BC), dtype=torch.bool, device=self.device)
        stay[rows.to(self.device)] = False
        self._cache.batch_select_indices(stay.nonzero()[:, 0])
        self._mask_BC = self._mask_BC[stay]

    def _close_up(self) -> None:
        """Moves each row's columns together, to the right, once too many of them are holes."""
        width, longest = self._mask_BC.shape[1], int(self.length_B.max())
        if width - longest <= HOLES * width:
            return
        order_BC = self._mask_BC.argsort(dim=1, stable=True)[:, width - longest :]
        self._mask_BC = self._mask_BC.gather(1, order_BC)
        for layer in self._cache.layers:
            layer.keys = _columns(layer.keys, order_BC)
            layer.values = _columns(layer.values, order_BC)

    def _holds(self, num_columns: int) -> bool:
        """Has the model put these tokens into the cache that it was given?"""
        from transformers.cache_utils import DynamicLayer

        attends = any(isinstance(layer, DynamicLayer) for layer in self._cache.layers)
        return attends and self._cache.get_seq_length() == num_columns

    @torch.no_grad()
    def _read(self, ids_BG: Tensor, mask_BG: Tensor) -> Tensor:
        start_B1 = self.length_B[:, None]
        self._mask_BC = torch.cat([self._mask_BC, mask_BG.to(self._mask_BC.dtype)], dim=1)
        with self._within():
            backbone, _ = split(self.model)
            output = backbone(
                input_ids=ids_BG,
                attention_mask=self._mask_BC,
                position_ids=(start_B1 + mask_BG.cumsum(1) - 1).clamp_min(0),
                past_key_values=self._cache,
                use_cache=True,
            )
        if not self._holds(self._mask_BC.shape[1]):
            raise ModelError(
                f"{type(unwrap_adapters(self.model)).__name__} keeps no cache of its tokens that "
                "can be stepped; it cannot write interleaved"
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
    """A Session of a model that is made ready to write, and left as it was."""
    with contextlib.ExitStack() as stack:
        with within():  # its layers are packed for the products that they will make there
            stack.enter_context(ready_to_write(model, len(prompts)))
        yield Session(model, tokenizer, prompts, within=within)


@contextlib.contextmanager
def ready_to_write(model: PreTrainedModel, batch_size: int) -> Iterator[None]:
    """In eval mode, with packed layers, and without compiling: shapes change with every token."""
    with eval_mode(model), packed(model, batch_size), torch.compiler.set_stance("force_eager"):
        yield


def _columns(states_BDCH: Tensor, order_BC: Tensor) -> Tensor:
    """Each row's chosen columns, in this order; D = heads of the cache."""
    _, heads, _, size = states_BDCH.shape
    return states_BDCH.gather(2, order_BC[:, None, :, None].expand(-1, heads, -1, size))
