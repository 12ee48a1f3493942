"""A student that trains a small adapter beside frozen weights (LoRA), alone or merged at the end.

A, B = the two factors of a layer's change, I = inputs, O = outputs, R = rank:
W' = W + scaling * B A (Hu et al. 2021, eq. 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    dropout: float,
    seed: int,
) -> PeftModel:
    """The model with its weights frozen and a LoRA adapter on the target layers.

    `targets` are names of linear layers, or `all-linear`: all but the head.  Raises ModelError
    where a name is none of the model's layers.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same start on every rank and in every run
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
            names = sorted({name.rpartition(".")[2] for name, _ in layers})
            raise ModelError(
                f"student.peft.targets: {error} Choose among the linear layers of this model: "
                f"{', '.join(names)}."
            ) from error


def merged_state(student: PeftModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain model that the adapted one amounts to, under its own names.

    `state` is the adapted model's whole state: live, or gathered where a wrapper shards it.  Raises
    ModelError for adapters that are not plain LoRA.
    """
    prefix = "base_model.model."
    weights = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    merged = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in weights.items()
        if ".lora_" not in name
    }
    (adapter,) = student.active_adapters
    for name, layer in _lora_layers(student, adapter):
        down_RI = weights[f"{name}.lora_A.{adapter}.weight"]
        up_OR = weights[f"{name}.lora_B.{adapter}.weight"]
        change_OI = layer.scaling[adapter] * (up_OR.float() @ down_RI.float())
        change = change_OI.t() if layer.fan_in_fan_out else change_OI
        base = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (base.float() + change).to(base.dtype)
    return merged


def _lora_layers(student: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    layers = []
    for name, layer in student.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            if adapter not in layer.lora_A or layer.use_dora.get(adapter) or layer.merged:
                raise ModelError(
                    f"the adapter on {name} is not plain LoRA, so it cannot be merged. Export it "
                    "as an adapter: set student.peft.save: adapter."
                )
            layers.append((name, layer))
    return layers
