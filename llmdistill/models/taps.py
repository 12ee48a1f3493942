"""Hooks that record a model's inner states during a forward pass.

B = sequences, T = tokens, H = hidden size, D = width of all attention heads together.

Decoder layers are numbered from 1, so "after layer 0" means the embeddings.  Negative numbers count
from the end: -1 is the last layer, before the final norm.

A hook only stores a tensor and computes nothing.  Activation checkpointing therefore sees the same
operations when it runs a layer again.  The hooks are removed before that, so nothing is recorded
twice.
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
    """One thing that an objective needs from a model, or that a teacher provides.

    - `what`: the next-token distribution, the hidden states after a decoder layer, or the queries,
      keys or values of a decoder layer before the rotary embedding.
    - `layer`: None means any layer: a teacher that provides `Need.HIDDEN` provides all of them.
    - `tokens`: whether states of all tokens are kept, or only those that predict a token.
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
        """Return the same need for one layer, as in `Need.HIDDEN.after(-1)`."""
        return replace(self, layer=layer, tokens=tokens)

    @property
    def kind(self) -> Need:
        """The need without its layer and tokens, as a teacher's `provides` lists it."""
        return Need(self.what)

    def __str__(self) -> str:
        place = "" if self.layer is None else f" of layer {self.layer}"
        return f"{LABELS.get(self.what, self.what)}{place}"


LABELS = {"distribution": "the distribution", "hidden": "hidden states"}

# Set after the class, because they are instances of it.
Need.DISTRIBUTION = Need("distribution")
Need.HIDDEN = Need("hidden")
Need.QUERIES = Need("queries")
Need.KEYS = Need("keys")
Need.VALUES = Need("values")
STATES = frozenset({Need.HIDDEN, Need.QUERIES, Need.KEYS, Need.VALUES})

Record = Callable[[tuple, Any], None]  # (positional arguments, output) of a module


@contextlib.contextmanager
def taps(model: Any, needs: Iterable[Need]) -> Iterator[dict[Need, Tensor]]:
    """Yield a dict that is filled with the states of one forward pass when the context ends.

    Hidden states are (B, T, H); queries, keys and values are (B, T, D).  Needs without a layer
    (the distribution) are left out, because they need no hook.  Raises ModelError for a layer that
    does not exist or whose attention has a form that `attention.py` does not know.
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
        # Reshaped only now: a hook must not add operations to a layer (see above).
        found |= {need: take() for need, take in finish.items()}


def check_taps(model: Any, needs: Iterable[Need]) -> None:
    """Raise ModelError for a need that the model cannot provide.  Runs no forward pass."""
    with contextlib.ExitStack() as stack:
        for need in needs:
            if need.layer is not None:
                (_hidden if need.what == "hidden" else _projected)(model, need, stack)


def layers_seen_inside(model: Any, needs: Iterable[Need]) -> list[nn.Module]:
    """Return the decoder layers with a need for queries, keys or values; do not compile them.

    A compiled layer ignores hooks that were registered on its parts after it was compiled.
    """
    return [_layer(model, need) for need in needs if need.kind in STATES - {Need.HIDDEN}]


def _hidden(model: Any, need: Need, stack: contextlib.ExitStack) -> Callable[[], Tensor]:
    """Register a hook for hidden states, and return a function that returns them: (B, T, H).

    The states of layer 0, the embeddings, are the input of the first decoder layer.
    """
    taken: list[Tensor] = []
    embeddings = need.layer == 0

    def record(arguments: tuple, output: Any) -> None:
        taken[:] = [arguments[0] if embeddings else _first(output)]

    layer = decoder_layers(model)[0] if embeddings else _layer(model, need)
    stack.enter_context(_observed(layer, record))
    return lambda: _only(taken, need)


def _projected(model: Any, need: Need, stack: contextlib.ExitStack) -> Callable[[], Tensor]:
    """Register a hook for queries, keys or values, and return a function for them: (B, T, D)."""
    source: Projections = projections(unwrap_adapters(model), _layer(model, need), need.what)
    taken: list[Tensor] = []
    swapped: list[bool] = []

    def record(arguments: tuple, output: Any) -> None:
        taken[:] = [output]
        # A norm returns the layout of its input: (B, heads, T, size) or (B, T, heads, size).
        swapped[:] = [_heads_first(arguments[0])]

    stack.enter_context(_observed(source.module, record))
    return lambda: source.finish(_only(taken, need), swapped[0])


@contextlib.contextmanager
def _observed(module: nn.Module, record: Record) -> Iterator[None]:
    """Call `record` after each forward pass of a module, whether it is compiled or not."""
    # A compiled module ignores hooks that come later, so its compiled call is wrapped instead.
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
    """Return the decoder layer of a need; ModelError if it does not exist."""
    layers = decoder_layers(model)
    assert need.layer is not None
    # The embeddings (layer 0) are hidden states, but they have no queries, keys or values.
    first = 0 if need.what == "hidden" else 1
    if not (first <= need.layer <= len(layers) or -len(layers) <= need.layer < 0):
        raise ModelError(
            f"layer {need.layer} does not exist: {type(unwrap_adapters(model)).__name__} has "
            f"{len(layers)} decoder layers. Use {first} to {len(layers)}, or -1 for the last one."
        )
    return layers[need.layer - 1 if need.layer > 0 else need.layer]


def _heads_first(states: Tensor) -> bool:
    """Whether the input of a norm is (B, heads, T, size) instead of (B, T, heads, size)."""
    # The shapes may be equal.  Heads come first if the tensor is a transposed view of the
    # projection, in which the heads of one token are next to each other in memory.
    return states.dim() == 4 and states.stride(1) < states.stride(2)


def _first(output: Any) -> Tensor:
    """Return the hidden states in a layer's output: the tensor, or the first item of a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _only(taken: list[Tensor], need: Need) -> Tensor:
    if not taken:
        raise ModelError(f"the forward pass did not compute {need}. Run all layers of the model.")
    return taken[0]
