"""Builds the student that a recipe asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmdistill import recipe
from llmdistill.errors import RecipeError
from llmdistill.models.adapters import add_adapter
from llmdistill.models.carve import Plan, carve
from llmdistill.models.load import load_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


def build_student(
    answer: recipe.StudentRecipe,
    *,
    base: PreTrainedModel | None,
    sample: tuple[Tensor, Tensor],
    device: torch.device | str | None,
    seed: int,
) -> PreTrainedModel:
    """The student as it is trained: carved, and with an adapter, where the recipe says so.

    `base` is its model where that is loaded already; only a carved student, which copies what it
    keeps, can use it.  `sample` is text to carve by: ids and mask, (B, T) each.
    """
    if base is None or answer.carve is None:
        base = load_model(
            answer.model,
            revision=answer.revision,
            dtype=answer.dtype,
            device=device,
            quantization=answer.quantization,
        )
    if answer.carve is not None:
        plan = Plan(**answer.carve.model_dump())
        ids_BT, mask_BT = (part.to(base.device) for part in sample)
        base = carve(base, plan, ids_BT, mask_BT)
    alone = answer.peft is not None and answer.peft.save == "adapter"
    if getattr(base, "is_quantized", False) and not alone:
        raise RecipeError(
            f"student.model: '{answer.model}' is quantised, and such weights can be neither "
            "trained nor merged into; train an adapter on it (student.peft with save: adapter)"
        )
    if answer.peft is None:
        return base.requires_grad_(True)
    return add_adapter(
        base,
        rank=answer.peft.r,
        alpha=answer.peft.alpha,
        targets=answer.peft.targets,
        dropout=answer.peft.dropout,
        seed=seed,
    )
