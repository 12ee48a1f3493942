"""Split a causal language model into a backbone and a head.

B = sequences, T = tokens, N = positions, H = hidden size, V = vocabulary.

The head turns final hidden states into logits: a matrix, and in some families a bias, a scale and a
softcap.  Separate from the backbone, it can be applied to the predicted positions only, and to a
chunk of them at a time.

Call `split` again for each use, and do not keep its result: a wrapper such as FSDP2 may replace the
tensor of a parameter in between.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError


@dataclass(frozen=True)
class Head:
    """The output matrix of a model with everything that is applied to its products.

    logits = cap(scale * (hidden @ weight.T + bias)), where cap(x) = softcap * tanh(x / softcap).
    `whole` is the head that this one was cut from by `narrow`, if it was.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    whole: Head | None = None

    @property
    def num_tokens(self) -> int:
        """Number of ids that the head scores, including padding rows."""
        return self.weight_VH.shape[0]

    def narrow(self, num_tokens: int) -> Head:
        """Return the head over the first `num_tokens` ids, for models whose padding rows differ.

        The weight is shared, so gradients reach it.  Raises ModelError if the head has fewer ids.
        """
        if num_tokens == self.num_tokens:
            return self
        if num_tokens > self.num_tokens:
            raise ModelError(
                f"cannot narrow a head over {self.num_tokens} tokens to {num_tokens} tokens. "
                f"Use at most {self.num_tokens}."
            )
        bias_V = None if self.bias_V is None else self.bias_V[:num_tokens]
        weight_VH, whole = self.weight_VH[:num_tokens], self.whole or self
        return replace(self, weight_VH=weight_VH, bias_V=bias_V, whole=whole)

    def detach(self) -> Head:
        """Return the same head without gradients."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VH=self.weight_VH.detach(), bias_V=bias_V, whole=None)

    def finish(self, products_NV: Tensor) -> Tensor:
        """Return the logits of the products hidden @ weight.T: (N, V), in their dtype."""
        logits_NV = products_NV
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V.to(products_NV.dtype)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """Return all logits at once: (..., V).

        Use this for a few positions only, and `objectives.chunked` for more.
        """
        return self.finish(nn.functional.linear(hidden_NH.to(self.weight_VH.dtype), self.weight_VH))


def unwrap_adapters(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, with its adapter layers still active.

    Other models are returned as they are.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def split(model: Any) -> tuple[nn.Module, Head]:
    """Return the backbone (ids to final hidden states) and the head of a causal LM.

    Raises ModelError unless the model consists of a base model and one linear output layer.
    """
    inner = unwrap_adapters(model)
    backbone = getattr(inner, "base_model", None)
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if backbone is None or backbone is inner or output is None:
        raise ModelError(
            f"{type(inner).__name__} cannot be split into a base model and an output layer. Use a "
            "causal language model of transformers that has both."
        )
    # With an adapter on the head (PEFT's "base_layer"), its weight alone would not be the head.
    weight_VH = getattr(output, "weight", None)
    # ZeRO-3 leaves an empty weight behind outside a forward pass, with its real shape.
    shape = getattr(weight_VH, "ds_shape", getattr(weight_VH, "shape", ()))
    if not isinstance(weight_VH, Tensor) or len(shape) != 2 or hasattr(output, "base_layer"):
        raise ModelError(
            f"the output layer of {type(inner).__name__} ({type(output).__name__}) is not a plain "
            "linear layer. Leave it unquantised and without an adapter (student.peft.targets)."
        )
    config = inner.config.get_text_config()
    return backbone, Head(
        weight_VH, getattr(output, "bias", None), _scale(config), _softcap(config)
    )


def takes_positions(backbone: nn.Module) -> bool:
    """Whether the forward pass of a backbone takes the positions of its tokens."""
    known = inspect.signature(backbone.forward).parameters
    kinds = (one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    return "position_ids" in known or any(kinds)


def num_rows(model: Any) -> int:
    """Return the number of ids that the model's head scores, including padding rows."""
    return unwrap_adapters(model).get_output_embeddings().weight.shape[0]


def final_norm(model: Any) -> nn.Module:
    """Return the norm after the last layer of a causal LM; ModelError if it has none."""
    backbone, _ = split(model)
    # Found by the name of its class, so that a new family needs no entry here.
    norms = [child for child in backbone.children() if "norm" in type(child).__name__.lower()]
    if not norms:
        raise ModelError(
            f"{type(backbone).__name__} has no norm after its last layer, with which an exit could "
            "start. Use another model."
        )
    return norms[-1]


def _scale(config: Any) -> float:
    """Return the factor of the logits.

    Cohere multiplies them by `logit_scale`, and Granite divides them by `logits_scaling`.
    """
    return getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )


def _softcap(config: Any) -> float | None:
    """Return the softcap of the final logits (Gemma 2), or None."""
    return getattr(config, "final_logit_softcapping", None)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and restore the mode of each of its modules afterwards."""
    # Module by module: `train()` would also change modules that were put in eval mode by hand.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def not_finite_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that have a NaN or an infinity."""
    named = model.named_parameters()
    return [name for name, p in named if not (p.is_meta or bool(torch.isfinite(p).all()))]


@torch.no_grad()
def check_split(model: nn.Module) -> None:
    """Raise ModelError unless backbone and head reproduce the model's own logits on a few tokens.

    This finds families whose head does something that `split` does not know, and families that read
    padding as text although a mask hides it.
    """
    ids_BT = torch.arange(1, 6, device=next(model.parameters()).device)[None]
    with eval_mode(model):
        expected = model(input_ids=ids_BT, use_cache=False).logits
        backbone, head = split(model)
        found = head(backbone(input_ids=ids_BT, use_cache=False).last_hidden_state)
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3):
        if spoilt := not_finite_weights(model):
            raise ModelError(
                f"{type(unwrap_adapters(model)).__name__} has weights that are not finite: "
                f"{', '.join(spoilt[:3])}. Load another copy of the model."
            )
        gap = float((found.float() - expected.float()).abs().max())
        raise ModelError(
            f"{type(unwrap_adapters(model)).__name__}: head(backbone(x)) differs from the model's "
            f"own logits by up to {gap:.3g}. llmdistill does not know the head of this family. "
            "Please report it."
        )
    if _ignores_masks(model, backbone, ids_BT):
        raise ModelError(
            f"{type(unwrap_adapters(model)).__name__} reads padding as text, so a row would depend "
            "on the others in its batch. Use a model of another family."
        )


@torch.no_grad()
def check_embeddings(model: nn.Module) -> None:
    """Raise ModelError unless the model reads embeddings as it reads the ids that they belong to.

    Some families look up more than the embeddings of an id.
    """
    ids_BT = torch.arange(1, 6, device=next(model.parameters()).device)[None]
    with eval_mode(model):
        backbone = split(model)[0]
        expected = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        embedded_BTH = backbone.get_input_embeddings()(ids_BT)  # type: ignore[operator]
        found = backbone(inputs_embeds=embedded_BTH, use_cache=False).last_hidden_state
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{type(unwrap_adapters(model)).__name__} reads more of a token than its embedding, so "
            "its inputs cannot be changed. Remove the objectives on changed inputs, or use a model "
            "of another family."
        )


def _ignores_masks(model: nn.Module, backbone: nn.Module, ids_BT: Tensor) -> bool:
    """Whether padding in front of a text changes its states, and a mask does not change them."""
    padded_BT = torch.cat([torch.zeros_like(ids_BT[:, :3]), ids_BT], 1)
    mask_BT = (torch.arange(padded_BT.shape[1], device=ids_BT.device) >= 3).long()[None]
    options = {}
    if takes_positions(backbone):
        options["position_ids"] = (mask_BT.cumsum(1) - 1).clamp_min(0)
    with eval_mode(model):
        alone, masked, open_ = (
            backbone(input_ids=ids, use_cache=False, **more).last_hidden_state[:, -5:].float()
            for ids, more in (
                (ids_BT, {}),
                (padded_BT, {"attention_mask": mask_BT, **options}),
                (padded_BT, options),
            )
        )
    return torch.equal(masked, open_) and not torch.allclose(alone, masked, rtol=1e-2, atol=1e-2)
