"""Quantised weights: a teacher, or a student's frozen base, in a quarter or half of the memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llmdistill.errors import ModelError


def _bnb_4bit(dtype: torch.dtype) -> Any:
    """4-bit NormalFloat, doubly quantised.  Dettmers et al. 2023, "QLoRA", section 3."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _bnb_8bit(dtype: torch.dtype) -> Any:
    """8-bit rows with outliers kept apart.  Dettmers et al. 2022, "LLM.int8()"."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(dtype: torch.dtype) -> Any:
    """8-bit weights, products in the model's dtype."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(quant_type=Int8WeightOnlyConfig())


class QuantizationKind(NamedTuple):
    """The package that it needs, what `from_pretrained` takes for a dtype, and the bytes that a
    weight then takes, scales included.
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
    """What `from_pretrained` takes for a kind of QUANTIZATIONS; all but the head is quantised.

    Raises ModelError for another kind, or where its package is missing.
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
