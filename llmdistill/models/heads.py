"""A causal language model as a backbone and a head.

B = sequences, T = tokens, N = positions, H = hidden size, V = vocabulary.
The head is what turns final hidden states into logits: a matrix, perhaps a bias, a scale and a soft
cap.  Kept apart from the backbone it can be applied to the predicted positions only, a chunk at a
time.  `split` is called where it is used and its result is never kept: a wrapper (FSDP2, say) may
put another tensor object behind the same parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * (hidden @ weight.T + bias)), with cap(x) = softcap * tanh(x /
    softcap).
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def num_tokens(self) -> int:
        return self.weight_VH.shape[0]

    def narrow(self, num_tokens: int) -> Head:
        """The head over the first `num_tokens` ids: what two padded vocabularies share."""
        if num_tokens == self.num_tokens:
            return self
        if num_tokens > self.num_tokens:
            raise ModelError(
                f"cannot narrow a head over {self.num_tokens} tokens to {num_tokens} tokens. "
                f"Use at most {self.num_tokens}."
            )
        bias_V = None if self.bias_V is None else self.bias_V[:num_tokens]
        return replace(self, weight_VH=self.weight_VH[:num_tokens], bias_V=bias_V)

    def detach(self) -> Head:
        """The same head without a way back for gradients."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VH=self.weight_VH.detach(), bias_V=bias_V)

    def finish(self, products_NV: Tensor) -> Tensor:
        """Logits from the products hidden @ weight.T: (N, V), in the products' dtype."""
        logits_NV = products_NV
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V.to(products_NV.dtype)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """All logits at once: (..., V).
        For a few positions; `objectives.chunked` does the rest.
        """
        return self.finish(nn.functional.linear(hidden_NH.to(self.weight_VH.dtype), self.weight_VH))


def unwrap_adapters(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, its adapter layers in place; others as they
    are.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def split(model: Any) -> tuple[nn.Module, Head]:
    """The backbone (ids -> final hidden states) and the head of a causal LM of transformers.

    Raises ModelError for a model without the common form: a base model and one linear output layer.
    """
    inner = unwrap_adapters(model)
    backbone = getattr(inner, "base_model", None)
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if backbone is None or backbone is inner or output is None:
        raise ModelError(
            f"{type(inner).__name__} cannot be split into a base model and an output layer. Use a "
            "causal language model of transformers that has both."
        )
    weight_VH = getattr(output, "weight", None)
    if not isinstance(weight_VH, Tensor) or weight_VH.dim() != 2 or hasattr(output, "base_layer"):
        raise ModelError(
            f"the output layer of {type(inner).__name__} is a {type(output).__name__}, not a plain "
            "linear layer. Leave it unquantised and without an adapter."
        )
    config = inner.config.get_text_config()
    return backbone, Head(
        weight_VH, getattr(output, "bias", None), _scale(config), _softcap(config)
    )


def num_rows(model: Any) -> int:
    """Ids that the model's head scores, padding rows included."""
    return unwrap_adapters(model).get_output_embeddings().weight.shape[0]


def _scale(config: Any) -> float:
    """Cohere multiplies its logits by `logit_scale`; Granite divides them by `logits_scaling`."""
    return getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )


def _softcap(config: Any) -> float | None:
    return getattr(config, "final_logit_softcapping", None)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode for a while, and each of its modules back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def check_split(model: nn.Module) -> None:
    """Raises ModelError unless backbone and head give the model's own logits on a few tokens.

    A family whose head does something that `split` does not know of is found here, by numbers.
    """
    ids_BT = torch.arange(1, 6, device=next(model.parameters()).device)[None]
    with eval_mode(model):
        expected = model(input_ids=ids_BT, use_cache=False).logits
        backbone, head = split(model)
        found = head(backbone(input_ids=ids_BT, use_cache=False).last_hidden_state)
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3):
        gap = float((found.float() - expected.float()).abs().max())
        raise ModelError(
            f"{type(unwrap_adapters(model)).__name__}: head(backbone(x)) differs from the model's "
            f"own logits by up to {gap:.3g}. llmdistill does not know the head of this family. "
            "Please report it."
        )
