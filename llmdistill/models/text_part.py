"""Load the text side of a model that also reads images as a causal LM."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from llmdistill.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("llmdistill")


def text_part(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return the causal LM within a model that reads more than text; others are returned as is.

    The weights are shared.  Raises ModelError if transformers has no causal LM of the same parts.
    """
    from transformers import AutoModelForCausalLM

    config = model.config.get_text_config()
    if config is model.config:
        return model
    inner, head = model.get_decoder(), model.get_output_embeddings()
    try:
        with torch.device("meta"):  # its weights are replaced
            made = AutoModelForCausalLM.from_config(config)
    except ValueError:  # its text side is no causal LM of transformers
        made = None
    if made is None or head is None or type(made.base_model) is not type(inner):
        raise ModelError(
            f"'{name}' is a {type(model).__name__}, which reads more than text, and its text side "
            "cannot be used alone. Use a text model, or a teacher of kind multimodal."
        )
    logger.info("using the text side of %s", name)
    setattr(made, made.base_model_prefix, inner)
    made.set_output_embeddings(head)
    made.generation_config = model.generation_config
    made.is_text_part = True
    config.dtype = model.dtype
    return made.eval()
