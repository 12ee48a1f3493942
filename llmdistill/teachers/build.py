"""Who judges?  Builds the teacher that a recipe asks for."""

from __future__ import annotations

from llmdistill import recipe
from llmdistill.models.load import load_model, load_tokenizer
from llmdistill.teachers.local import LocalTeacher


def build_teacher(answer: recipe.LocalTeacherRecipe) -> LocalTeacher:
    """The teacher that a recipe asks for, where it is a model of its own."""
    model = load_model(
        answer.model,
        revision=answer.revision,
        dtype=answer.dtype,
        device=answer.device,
        quantization=answer.quantization,
        offload=answer.offload,
    )
    return LocalTeacher(model, load_tokenizer(answer.model, revision=answer.revision))
