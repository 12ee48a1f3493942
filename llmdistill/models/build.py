"""Build the student that a recipe describes.

B = sequences, T = tokens.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch

from llmdistill import recipe
from llmdistill.errors import RecipeError
from llmdistill.models.adapters import add_adapter, require_mergeable
from llmdistill.models.carve import Plan, carve
from llmdistill.models.embedded import EMBEDDED
from llmdistill.models.load import DTYPES, load_config, load_model
from llmdistill.models.sharding import loading_whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger("llmdistill")

LOADING = {"revision", "dtype", "quantization", "attn_implementation"}  # keys of `load_model`
ROUNDS = (
    "student.dtype: the weights that are trained have 16 bits, so most steps of a small learning "
    "rate are rounded away. Use float32 (training.bf16 still computes in bfloat16), or peft."
)


@loading_whole()
def build_student(
    section: recipe.StudentRecipe,
    *,
    base: PreTrainedModel | None,
    sample: tuple[Tensor, Tensor],
    device: torch.device | str | None,
    seed: int,
) -> PreTrainedModel:
    """Return the student as it is trained: carved and with an adapter if the recipe has them.

    `base` is the model of the student if it is already loaded (as the teacher).  It is used only
    for a carved student, which copies the weights that it keeps.  `sample` is the text on which
    influence and activity are measured: ids and mask, (B, T) each.

    Raises RecipeError for a quantised base that is not trained by an adapter which is saved alone.
    """
    # A student that is not carved would share its weights with the teacher, so it is loaded again.
    if base is None or section.carve is None:
        base = load_model(section.model, device=device, **section.model_dump(include=LOADING))
    if section.carve is not None:
        plan = Plan(**section.carve.model_dump())
        ids_BT, mask_BT = (part.to(base.device) for part in sample)
        base = carve(base, plan, ids_BT, mask_BT)
    alone = section.peft is not None and section.peft.save == "adapter"
    if getattr(base, "is_quantized", False) and not alone:
        raise RecipeError(
            f"student.model: '{section.model}' is quantised, and quantised weights can neither be "
            "trained nor merged with an adapter. Train an adapter and save it alone: set "
            "student.peft with save: adapter."
        )
    if alone and getattr(base, "is_text_part", False):
        raise RecipeError(
            f"student.peft.save: '{section.model}' also reads images, and others would put the "
            "adapter of its text side on the whole model. Use save: merged."
        )
    if section.peft is None:
        if base.dtype != torch.float32:
            logger.warning(ROUNDS)
        return base.requires_grad_(True)
    options = section.peft.model_dump(exclude={"save", "r"})
    adapted = add_adapter(base, rank=section.peft.r, seed=seed, **options)
    if not alone:
        require_mergeable(adapted)
    return adapted


def export_dtype(section: recipe.StudentRecipe, *, trained_in_bfloat16: bool) -> torch.dtype | None:
    """Return the dtype in which a student is exported; None is that in which it is trained.

    An adapter that is saved alone keeps its own.
    """
    if section.peft is not None and section.peft.save == "adapter":
        return None
    if section.export_dtype != "auto":
        return DTYPES[section.export_dtype]
    if trained_in_bfloat16:
        return torch.bfloat16
    return stored_dtype(section.model, revision=section.revision)


def stored_dtype(name: str, *, revision: str | None = None) -> torch.dtype | None:
    """Return the dtype of a model's files, or of its base model's; None if they do not say."""
    if name in EMBEDDED:
        return DTYPES[EMBEDDED[name].dtype]
    stored = getattr(load_config(name, revision=revision).get_text_config(), "dtype", None)
    return DTYPES.get(stored) if isinstance(stored, str) else stored


def rounded(
    model: PreTrainedModel, exported: torch.dtype | None, used: torch.dtype
) -> PreTrainedModel:
    """Return a model as it computes in the dtype `used` after it was exported in another one.

    It is the model itself if nothing changes, and otherwise a copy.
    """
    weights = {one.dtype for one in model.parameters() if one.is_floating_point()}
    if weights <= {used} and exported in (None, used):
        return model
    made = copy.deepcopy(model)
    # What is saved is rounded.  Loading a model computes the other buffers, such as the frequencies
    # of rotary positions, in float32.
    for saved in made.state_dict(keep_vars=True).values():
        if saved.is_floating_point() and not hasattr(saved, "__tensor_flatten__"):
            saved.data = saved.data.to(exported or used).to(used)
    return made
