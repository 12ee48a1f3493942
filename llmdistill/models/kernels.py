"""Which function computes a model's attention.

transformers looks it up by its name in each forward pass: its own attention, a package such as
flash-attn, or a kernel from the Hub.  The name is a choice of this machine, so an exported
configuration does not have it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llmdistill.errors import ModelError

AUTO = "auto"
ADVICE = "Use 'attn_implementation: auto' or another one."


class Needs(NamedTuple):
    """What an implementation needs: a GPU, or a module and the package that installs it."""

    gpu: bool = False
    module: str | None = None
    package: str = ""


IMPLEMENTATIONS: dict[str, Needs] = {
    "auto": Needs(),
    "eager": Needs(),
    "sdpa": Needs(),
    "flash_attention_2": Needs(True, "flash_attn", "flash-attn"),
    "flash_attention_3": Needs(True, "flash_attn_interface", "flash-attn-3"),
    "flex_attention": Needs(True),  # compiled on a CPU, it has no gradients
}


def require_attention(name: str, implementation: str, device: torch.device) -> None:
    """Raise ModelError if an implementation is unknown, or cannot run here.

    `name` is the model's.  A name with a slash is that of a kernel on the Hub.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    on_hub = "/" in implementation
    # Own functions can be registered with transformers' AttentionInterface.
    known = {**dict.fromkeys(ALL_ATTENTION_FUNCTIONS.valid_keys(), Needs()), **IMPLEMENTATIONS}
    if not on_hub and implementation not in known:
        raise ModelError(
            f"cannot load '{name}': unknown attn_implementation '{implementation}'. Use one of "
            f"{', '.join(IMPLEMENTATIONS)}, or a kernel of the Hub such as "
            "kernels-community/flash-attn2."
        )
    needs = Needs() if on_hub else known[implementation]
    if needs.gpu and device.type == "cpu":
        raise _unavailable(
            name, implementation, "it needs a GPU, and the device is the CPU", ADVICE
        )
    # Without flash-attn, transformers takes the same function from the Hub, by this package.
    modules = [one for one in (needs.module, "kernels") if one is not None]
    if (on_hub or needs.module) and not any(map(importlib.util.find_spec, modules)):
        packages = " or ".join(one for one in (needs.package, "kernels") if one)
        todo = f"Install it with pip, or use 'attn_implementation: {AUTO}'."
        raise _unavailable(name, implementation, f"it needs the package {packages}", todo)


@contextlib.contextmanager
def attention_errors(name: str, implementation: str) -> Iterator[None]:
    """Turn transformers' errors about an implementation into a ModelError that says what to do."""
    try:
        yield
    except (ImportError, ValueError) as error:
        about = re.search(r"attn|attention|kernel", str(error), re.IGNORECASE)
        if implementation == AUTO or not about:
            raise
        # The sentences after the first one ask for changes of transformers itself.
        reason = re.split(r"\.\s+(?=[A-Z])", str(error))[0].rstrip(".")
        raise _unavailable(name, implementation, reason, ADVICE) from error


def _unavailable(name: str, implementation: str, reason: str, todo: str) -> ModelError:
    return ModelError(
        f"cannot load '{name}' with attn_implementation '{implementation}': {reason}. {todo}"
    )


def takes_lengths(backbone: Any) -> bool:
    """Whether the attention of a backbone takes the lengths of sequences instead of a 4-D mask."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

    choose_attention(backbone)
    # Every such function, from a package or from the Hub, is registered with this mask.
    mask = ALL_MASK_ATTENTION_FUNCTIONS.get(backbone.config._attn_implementation)
    return mask is flash_attention_mask


def attend_in_16_bits(model: Any) -> None:
    """Let a float32 model use flash attention under autocast alone, and its default elsewhere.

    Flash attention multiplies 16-bit numbers only.  A float32 student is trained under autocast,
    but it is measured and exported in float32.
    """
    backbone = model.base_model
    if model.dtype != torch.float32 or not takes_lengths(backbone):
        return
    default = backbone.get_correct_attn_implementation(None)
    backbone.attentions = (backbone.config._attn_implementation, default)
    backbone.register_forward_pre_hook(choose_attention)


def choose_attention(backbone: Any, _: object = None) -> None:
    """Choose between the two implementations of `attend_in_16_bits`, if the backbone has two."""
    if not hasattr(backbone, "attentions"):
        return
    weight = backbone.get_input_embeddings().weight
    narrow = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    backbone.config._attn_implementation = backbone.attentions[0 if narrow else 1]
