"""Builds the teacher of a recipe: who scores the tokens that the student learns on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmdistill.protocols import Teacher
from llmdistill.recipe import teachers as sections
from llmdistill.teachers.adapter_off import AdapterOffTeacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.pruned import PrunedTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_teacher(
    section: sections.TeacherRecipe,
    student: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Teacher:
    """Return the teacher that a section of a recipe describes.

    `student` and its `tokenizer` are needed only for sections whose `weights` are None, because
    these teachers use the student's own weights.
    """
    return _BUILDERS[type(section)](section, student, tokenizer)


def load_teacher(section: sections.LocalTeacherRecipe) -> LocalTeacher:
    """Load the model of a section onto this machine, and return it as a teacher."""
    return LocalTeacher.load(section.model, **section.model_dump(exclude={"kind", "model"}))


def _local(section: sections.LocalTeacherRecipe, *_: Any) -> Teacher:
    return load_teacher(section)


def _pruned(section: sections.PrunedTeacherRecipe, *_: Any) -> Teacher:
    added = section.model_dump(include={"share", "pruned_weight"})
    loaded = LocalTeacher.load(
        section.model, **section.model_dump(exclude={"kind", "model", *added})
    )
    return PrunedTeacher.of(loaded, **added)


def _adapter_off(_: sections.AdapterOffTeacherRecipe, student: Any, tokenizer: Any) -> Teacher:
    return AdapterOffTeacher(student, tokenizer)


# One builder for each section; a new teacher adds a line here.
_BUILDERS: dict[type, Callable[[Any, Any, Any], Teacher]] = {
    sections.LocalTeacherRecipe: _local,
    sections.PrunedTeacherRecipe: _pruned,
    sections.AdapterOffTeacherRecipe: _adapter_off,
}
