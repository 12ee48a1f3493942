"""Who judges?  Builds the teacher that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmdistill.protocols import Teacher
from llmdistill.recipe import teachers as sections
from llmdistill.teachers.adapter_off import AdapterOffTeacher
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_teacher(
    section: sections.TeacherRecipe,
    student: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Teacher:
    """The teacher that a recipe asks for.

    `student` with its `tokenizer` is for the sections whose `weights` are None: these teach with
    the student's own weights.
    """
    return _BUILDERS[type(section)](section, student, tokenizer)


def load_teacher(section: sections.LocalTeacherRecipe) -> LocalTeacher:
    """A model on this machine, in the form that the section asks for."""
    return LocalTeacher.load(section.model, **section.model_dump(exclude={"kind", "model"}))


def _local(section: sections.LocalTeacherRecipe, *_: Any) -> Teacher:
    return load_teacher(section)


def _adapter_off(_: sections.AdapterOffTeacherRecipe, student: Any, tokenizer: Any) -> Teacher:
    return AdapterOffTeacher(student, tokenizer)


_BUILDERS: dict[type, Callable[[Any, Any, Any], Teacher]] = {
    sections.LocalTeacherRecipe: _local,
    sections.AdapterOffTeacherRecipe: _adapter_off,
}
