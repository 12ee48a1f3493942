"""Find the modules in which a decoder layer computes its queries, keys and values.

B = sequences, T = tokens, D = width of all heads together.

The states are those before the rotary embedding.  Most families use three linear layers, and some
use a fused one whose output is split.  If a family normalises queries and keys after the
projection, the normalised ones are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from llmdistill.errors import ModelError

Part = Literal["queries", "keys", "values"]
# Names of the attention in a decoder layer, and of its parts, in the families of transformers.
ATTENTION = ("self_attn", "attention", "attn")
SEPARATE: dict[str, str] = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}
NORMS: dict[str, tuple[str, ...]] = {
    "queries": ("q_norm", "q_layernorm"),
    "keys": ("k_norm", "k_layernorm"),
    "values": ("v_norm",),
}


class Projections(NamedTuple):
    """A module to observe.  `finish(output, heads_first)` reshapes its output to (B, T, D)."""

    module: nn.Module
    finish: Callable[[Tensor, bool], Tensor]


def projections(model: Any, layer: nn.Module, part: str) -> Projections:
    """Return where a decoder layer computes a part: "queries", "keys" or "values".

    Raises ModelError for an attention of an unknown form.
    """
    attention = next((a for a in (getattr(layer, n, None) for n in ATTENTION) if a), None)
    if attention is not None:
        # A norm comes after the projection, so it is preferred if there is one.
        norm = next((m for m in (getattr(attention, n, None) for n in NORMS[part]) if m), None)
        if norm is not None:
            return Projections(norm, _flat)
        own = getattr(attention, SEPARATE[part], None)
        if own is not None:
            return Projections(own, _flat)
        for name, cut in FUSED.items():
            fused = getattr(attention, name, None)
            if fused is not None and cut.fits(model.config):
                return Projections(fused, cut.part(model.config.get_text_config(), part))
    raise ModelError(
        f"{type(model).__name__}: llmdistill does not know how {type(layer).__name__} computes its "
        f"{part}. Match hidden states instead."
    )


def _flat(states: Tensor, heads_first: bool) -> Tensor:
    """Return (B, T, D) from (B, T, D), (B, T, heads, size) or, heads first, (B, heads, T, size)."""
    if heads_first:
        states = states.transpose(1, 2)
    return states if states.dim() == 3 else states.flatten(2)


class Concatenated:
    """A fused layer whose output is all queries, then all keys, then all values (Phi-3, GPT-2)."""

    def fits(self, config: Any) -> bool:
        """Whether models with this configuration split their layer in this way."""
        # By family, not by the name of the layer: CodeGen and GPTBigCode split a layer of the same
        # name differently, and their queries would be taken for keys.
        return config.model_type in ("phi3", "gpt2")

    def part(self, config: Any, part: str) -> Callable[[Tensor, bool], Tensor]:
        """Return the function that cuts a part out of the layer's output: (B, T, D)."""
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        order = {"queries": 0, "keys": 1, "values": 2}[part]

        def cut(states: Tensor, heads_first: bool) -> Tensor:
            # With grouped-query attention there are fewer heads of keys and values.
            size = states.shape[-1] // (heads + 2 * key_heads)
            widths = [heads * size, key_heads * size, key_heads * size]
            return states.split(widths, dim=-1)[order]

        return cut


class ByHead:
    """A fused layer whose output is the query, key and value of each head in turn (GPT-NeoX)."""

    def fits(self, config: Any) -> bool:
        return config.model_type == "gpt_neox"

    def part(self, config: Any, part: str) -> Callable[[Tensor, bool], Tensor]:
        heads = config.num_attention_heads
        order = {"queries": 0, "keys": 1, "values": 2}[part]
        return lambda states, _: states.unflatten(-1, (heads, 3, -1))[..., order, :].flatten(2)


FUSED: dict[str, Concatenated | ByHead] = {
    "qkv_proj": Concatenated(),
    "c_attn": Concatenated(),
    "query_key_value": ByHead(),
}
