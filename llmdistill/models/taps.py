"""Hooks that take a model's inner states while it reads.

B = sequences, T = tokens, H = hidden size, D = width of all attention heads together.
Decoder layers count from 1, so "after layer 0" are the embeddings; negative numbers count from the
end, so -1 is the last layer, before the final norm.  A hook keeps a tensor as it comes and computes
nothing, so activation checkpointing sees the same operations when it runs a layer again; by then
the hooks are gone, so nothing is taken twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.attention import Projections, projections
from llmdistill.models.heads import unwrap_adapters
from llmdistill.models.layers import decoder_layers

Tokens = Literal["predicted", "all"]


@dataclass(frozen=True)
class Need:
    """One thing that an objective asks of a model, or that a teacher can give.

    `what` is the next-token distribution, the hidden states after a decoder layer, or the queries,
    keys or values of a decoder layer before the rotary embedding.  `layer` None means any layer:
    a teacher that provides `Need.HIDDEN` gives all of them.  `tokens` says which ones are kept.
    """

    what: Literal["distribution", "hidden", "queries", "keys", "values"]
    layer: int | None = None
    tokens: Tokens = "predicted"

    DISTRIBUTION: ClassVar[Need]
    HIDDEN: ClassVar[Need]
    QUERIES: ClassVar[Need]
    KEYS: ClassVar[Need]
    VALUES: ClassVar[Need]

    def after(self, layer: int, tokens: Tokens = "predicted") -> Need:
        """The same at one layer: Need.HIDDEN.after(-1)."""
        return replace(self, layer=layer, tokens=tokens)

    @property
    def kind(self) -> Need:
        """Without the layer and the tokens: what a teacher's `provides` lists."""
        return Need(self.what)

    def __str__(self) -> str:
        place = "" if self.layer is None else f" of layer {self.layer}"
        return f"{LABELS.get(self.what, self.what)}{place}"


LABELS = {"distribution": "the distribution", "hidden": "hidden states"}

Need.DISTRIBUTION = Need("distribution")
Need.HIDDEN = Need("hidden")
Need.QUERIES = Need("queries")
Need.KEYS = Need("keys")
Need.VALUES = Need("values")
STATES = frozenset({Need.HIDDEN, Need.QUERIES, Need.KEYS, Need.VALUES})

Record = Callable[[tuple, Any], None]  # (positional arguments, output) of a module


@contextlib.contextmanager
def taps(model: Any, needs: Iterable[Need]) -> Iterator[dict[Need, Tensor]]:
    """Fills a dict with what one forward pass inside the context shows, when the context ends.

    Hidden states are (B, T, H); queries, keys and values are (B, T, D).  Needs for the distribution
    are left out: no hook is needed for it.  Raises ModelError for a layer that the model does not
    have, or whose attention has another form than `attention.py` knows.
    """
    found: dict[Need, Tensor] = {}
    wanted = [need for need in needs if need.layer is not None]
    if not wanted:
        yield found
        return
    finish: dict[Need, Callable[[], Tensor]] = {}
    with contextlib.ExitStack() as stack:
        for need in wanted:
            tap = _hidden if need.what == "hidden" else _projected
            finish[need] = tap(model, need, stack)
        yield found
        found |= {need: take() for need, take in finish.items()}


def check_taps(model: Any, needs: Iterable[Need]) -> None:
    """Raises ModelError for a need that this model cannot serve; reads nothing."""
    with contextlib.ExitStack() as stack:
        for need in needs:
            if need.layer is not None:
                (_hidden if need.what == "hidden" else _projected)(model, need, stack)


def layers_seen_inside(model: Any, needs: Iterable[Need]) -> list[nn.Module]:
    """The decoder layers of which a need takes something from within: these must not be compiled.

    A compiled layer runs without the hooks that were put on its parts after it was compiled.
    """
    return [_layer(model, need) for need in needs if need.kind in STATES - {Need.HIDDEN}]


def _hidden(model: Any, need: Need, stack: contextlib.ExitStack) -> Callable[[], Tensor]:
    """Layer 0, the embeddings, are what the first layer is given."""
    taken: list[Tensor] = []
    embeddings = need.layer == 0

    def record(arguments: tuple, output: Any) -> None:
        taken[:] = [arguments[0] if embeddings else _first(output)]

    layer = decoder_layers(model)[0] if embeddings else _layer(model, need)
    stack.enter_context(_observed(layer, record))
    return lambda: _only(taken, need)


def _projected(model: Any, need: Need, stack: contextlib.ExitStack) -> Callable[[], Tensor]:
    source: Projections = projections(unwrap_adapters(model), _layer(model, need), need.what)
    taken: list[Tensor] = []
    swapped: list[bool] = []

    def record(arguments: tuple, output: Any) -> None:
        taken[:] = [output]
        swapped[:] = [_heads_first(arguments[0])]

    stack.enter_context(_observed(source.module, record))
    return lambda: source.finish(_only(taken, need), swapped[0])


@contextlib.contextmanager
def _observed(module: nn.Module, record: Record) -> Iterator[None]:
    """Calls `record` after each pass of a module, compiled or not.

    A compiled module does not look for hooks again, so its compiled call is wrapped instead.
    """
    compiled = module._compiled_call_impl
    if compiled is None:
        handle = module.register_forward_hook(lambda _module, args, output: record(args, output))
        try:
            yield
        finally:
            handle.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        output = compiled(*args, **kwargs)
        record(args, output)
        return output

    module._compiled_call_impl = call
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def _layer(model: Any, need: Need) -> nn.Module:
    layers = decoder_layers(model)
    assert need.layer is not None
    first = 0 if need.what == "hidden" else 1
    if not (first <= need.layer <= len(layers) or -len(layers) <= need.layer < 0):
        raise ModelError(
            f"layer {need.layer} does not exist: {type(unwrap_adapters(model)).__name__} has "
            f"{len(layers)} decoder layers. Use {first} to {len(layers)}, or -1 for the last one."
        )
    return layers[need.layer - 1 if need.layer > 0 else need.layer]


def _heads_first(states: Tensor) -> bool:
    """Is a norm given (B, heads, T, size) and not (B, T, heads, size)?  Told by the strides."""
    return states.dim() == 4 and states.stride(1) < states.stride(2)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _only(taken: list[Tensor], need: Need) -> Tensor:
    if not taken:
        raise ModelError(f"the forward pass did not compute {need}. Run all layers of the model.")
    return taken[0]
