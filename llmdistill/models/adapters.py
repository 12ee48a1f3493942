"""LoRA adapters: a student with frozen weights that trains a small adapter, merged or saved alone.

A, B = the two factors of a layer's change, I = inputs, O = outputs, R = rank:
W' = W + scaling * B A (Hu et al. 2021, eq. 3).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.models.embedded import public_name
from llmdistill.models.placement import is_whole

logger = logging.getLogger("llmdistill")

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
    key: str = "student.peft.targets",
) -> PeftModel:
    """Return the model with frozen weights and a trainable LoRA adapter on the target layers.

    `targets` are names of linear layers, or "all-linear" for all of them except the head.  `key` is
    the key of a recipe that sets them.  Raises ModelError if no layer has one of the names.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        # GPT-2's layers are Conv1D, whose weights are stored transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    # All ranks and runs start with the same adapter, and the global generator is left as it was.
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT uses an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
            names = sorted({name.rpartition(".")[2] for name, _ in layers})
            raise ModelError(
                f"{key}: {error} Choose among the linear layers of this model: {', '.join(names)}."
            ) from error
    embeddings = adapted.get_base_model().get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and hasattr(embeddings, "base_layer"):
        logger.warning(
            "the adapter changes the embeddings alone, not the head that shares their weights"
        )
    adapted.peft_config["default"].base_model_name_or_path = public_name(model.name_or_path)
    return adapted


def fit_tokens(base: PreTrainedModel, weights: str) -> None:
    """Give the base model as many tokens as the adapter was trained with, if it holds them."""
    from safetensors import safe_open

    own = base.get_input_embeddings().weight
    with safe_open(weights, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        names = list(file.keys())
    for name, shape in zip(names, shapes, strict=True):
        is_table = ".lora_" not in name and len(shape) == 2 and shape[1] == own.shape[1]
        if is_table and name.endswith((".embed_tokens.weight", ".lm_head.weight", ".wte.weight")):
            if shape[0] != len(own):
                logger.info("the adapter has %d tokens, its base model %d", shape[0], len(own))
                base.resize_token_embeddings(shape[0], mean_resizing=False)
            return


def require_mergeable(student: PeftModel) -> None:
    """Raise ModelError if the adapter is on a layer that it cannot be merged into."""
    (adapter,) = student.active_adapters
    _lora_layers(student, adapter)


def require_plain(model: PreTrainedModel) -> None:
    """Raise ModelError if the weights cannot be trained: they are quantised or not in one place."""
    whole = is_whole(model)
    if not whole or getattr(model, "is_quantized", False):
        raise ModelError(
            f"the weights of this {type(model).__name__} are "
            f"{'quantised' if whole else 'not in one place'}, so a teacher made of it cannot be "
            "trained. Load it without quantization and placement, or use a LocalTeacher."
        )


def merged_state(student: PeftModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain model with the adapter merged, under the plain model's names.

    `state` is the complete state dict of the adapted model; a sharded one must be gathered first.
    Raises ModelError for adapters that are not plain LoRA.
    """
    # Computed from a state dict instead of by PEFT's merge: this works with a gathered state, and
    # it leaves the model as it is, so that training can continue.
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
        # Added in float32, so that the sum is rounded only once.
        change_OI = layer.scaling[adapter] * (up_OR.float() @ down_RI.float())
        change = change_OI.t() if layer.fan_in_fan_out else change_OI
        base = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (base.float() + change).to(base.dtype)
    return merged


def _lora_layers(student: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    """Return the names and modules of the layers that the adapter is on."""
    from peft.tuners.lora import LoraLayer

    layers = []
    for name, layer in student.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            if adapter not in layer.lora_A or layer.use_dora.get(adapter) or layer.merged:
                raise ModelError(
                    f"the adapter on {name} is not plain LoRA on a linear layer, so it cannot be "
                    "merged. Choose linear layers in student.peft.targets, or export the adapter "
                    "alone: set student.peft.save: adapter."
                )
            layers.append((name, layer))
    return layers
