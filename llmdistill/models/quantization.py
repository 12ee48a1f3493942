"""Quantised weights for a teacher, or for the frozen base of a student.

They take about a quarter or a half of the memory of bfloat16 weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llmdistill.errors import ModelError


# These functions import what they need: transformers is slow to import, and torchao is optional.
def _bnb_4bit(dtype: torch.dtype) -> Any:
    """Return 4-bit NormalFloat, doubly quantised (Dettmers et al. 2023, "QLoRA", section 3)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _bnb_8bit(dtype: torch.dtype) -> Any:
    """Return 8-bit weights with separate outliers (Dettmers et al. 2022, "LLM.int8()")."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(dtype: torch.dtype) -> Any:
    """Return 8-bit weights whose products are computed in the dtype of the model."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(quant_type=Int8WeightOnlyConfig())


class QuantizationKind(NamedTuple):
    """A kind of quantisation.

    - `package`: the package that it needs.
    - `config`: makes the configuration for `from_pretrained` from the compute dtype.
    - `bytes_per_weight`: bytes of one weight in memory, including its share of the scales.
    """

    package: str
    config: Callable[[torch.dtype], Any]
    bytes_per_weight: float


QUANTIZATIONS: dict[str, QuantizationKind] = {
    "bnb_4bit": QuantizationKind("bitsandbytes", _bnb_4bit, 0.55),
    "bnb_8bit": QuantizationKind("bitsandbytes", _bnb_8bit, 1.03),
    "torchao_int8": QuantizationKind("torchao", _torchao_int8, 1.02),
}


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """Return the configuration for `from_pretrained` of a kind, a key of QUANTIZATIONS.

    All linear layers except the head are quantised.  Raises ModelError if the kind is unknown or
    its package is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ModelError(
            f"unknown quantization '{kind}'. Choose one of {', '.join(QUANTIZATIONS)}."
        )
    package = QUANTIZATIONS[kind].package
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"quantization '{kind}' needs {package}. Install it with: "
            "pip install 'llmdistill[quantization]'"
        )
    return QUANTIZATIONS[kind].config(dtype)
