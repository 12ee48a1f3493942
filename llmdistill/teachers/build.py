"""Builds the teacher of a recipe: who scores the tokens that the student learns on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.data.table import Row
from llmdistill.errors import RecipeError
from llmdistill.models.build import build_student
from llmdistill.models.load import load_model, load_processor, load_tokenizer
from llmdistill.protocols import Teacher
from llmdistill.recipe import self_teachers
from llmdistill.recipe import teacher_groups as groups
from llmdistill.recipe import teachers as sections
from llmdistill.teachers.adapter_off import AdapterOffTeacher
from llmdistill.teachers.ensemble import EnsembleTeacher, require_one_vocabulary
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.multimodal import MultimodalTeacher, require_shared_ids, seen_of
from llmdistill.teachers.mutual import MutualTeacher
from llmdistill.teachers.online import OnlineTeacher
from llmdistill.teachers.pruned import PrunedTeacher
from llmdistill.teachers.reflexive import ReflexiveTeacher
from llmdistill.teachers.routed import CurriculumTeacher, RoutedTeacher, token_balance

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """What a teacher may be made of, besides its own models.

    `student` is None until it is loaded; a section whose `uses_student` is True is built after it.
    `train` and `held` are the rows to train on and to measure on.  `sample` is the text by which a
    model is carved: ids and mask, (B, T) each.  `takes_data` is whether the dataset's responses are
    trained on, and `template_options` are those of the chat template.
    """

    student: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train: Sequence[Row] = ()
    held: Sequence[Row] = ()
    sample: tuple[Tensor, Tensor] | None = None
    device: str | None = None
    seed: int = 0
    takes_data: bool = True
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return (*self.train, *self.held)


def build_teacher(section: groups.TeacherRecipe, parts: Parts | None = None) -> Teacher:
    """Return the teacher that a section of a recipe describes.

    Raises RecipeError if a row names a teacher that is not listed.
    """
    return _BUILDERS[type(section)](section, parts or Parts())


def load_teacher(section: sections.LocalTeacherRecipe) -> LocalTeacher:
    """Load the model of a section onto this machine, and return it as a teacher."""
    return LocalTeacher.load(section.model, **section.model_dump(include=_LOADING))


# The keys of kind `local` other than the model's name.
_LOADING = set(sections.LocalTeacherRecipe.model_fields) - {"kind", "model"}


def _local(section: sections.LocalTeacherRecipe, _: Parts) -> Teacher:
    return load_teacher(section)


def _pruned(section: sections.PrunedTeacherRecipe, _: Parts) -> Teacher:
    added = section.model_dump(include={"share", "pruned_weight"})
    return PrunedTeacher.of(load_teacher(section), **added)


def _adapter_off(_: self_teachers.AdapterOffTeacherRecipe, parts: Parts) -> Teacher:
    return AdapterOffTeacher(parts.student, parts.tokenizer)


def _online(section: sections.OnlineTeacherRecipe, parts: Parts) -> Teacher:
    model = load_model(section.model, **section.model_dump(include=_LOADING))
    options = section.model_dump(exclude={"kind", "model", "r", *_LOADING})
    tokenizer = load_tokenizer(section.model, revision=section.revision)
    return OnlineTeacher(model, tokenizer, rank=section.r, seed=parts.seed, **options)


def _reflexive(section: self_teachers.ReflexiveTeacherRecipe, parts: Parts) -> Teacher:
    prompts = None
    if section.context is not None:
        prompts = {row.row_id: row.teacher_prompt_ids or row.prompt_ids for row in parts.rows}
    return ReflexiveTeacher(
        parts.student,
        parts.tokenizer,
        weights=section.weights,
        ema_rate=section.ema_rate,
        export_ema=section.export_ema,
        prompts=prompts,
    )


def load_multimodal(section: sections.MultimodalTeacherRecipe, parts: Parts) -> MultimodalTeacher:
    """Load the model of a section that also sees images, for the rows and tokenizer of `parts`."""
    # Rows first: a missing file shows in seconds, and the model may take minutes to load.
    processor = load_processor(section.model, revision=section.revision)
    seen = seen_of(parts.rows, section.images, image_folder(section))
    model = load_model(section.model, sees_images=True, **section.model_dump(include=_LOADING))
    return MultimodalTeacher(
        model,
        processor,
        seen=seen,
        tokenizer=parts.tokenizer,
        template_options=parts.template_options,
    )


def image_folder(section: sections.MultimodalTeacherRecipe) -> Path | None:
    """Return the folder that relative paths of images start from; None for the working one."""
    return None if section.image_folder is None else Path(section.image_folder).expanduser()


def _ensemble(section: groups.EnsembleTeacherRecipe, _: Parts) -> Teacher:
    teachers = [load_teacher(one) for one in section.teachers]
    return EnsembleTeacher(teachers, **section.model_dump(exclude={"kind", "teachers"}))


def check_rows(section: groups.TeacherRecipe, parts: Parts) -> None:
    """Check what the teacher reads of the rows, without loading a model.

    Raises RecipeError or DataError, as `build_teacher` does.
    """
    if isinstance(section, groups.RouteTeacherRecipe):
        route_of(section, parts)
    if isinstance(section, sections.MultimodalTeacherRecipe):
        processor = load_processor(section.model, revision=section.revision)
        assert parts.tokenizer is not None
        require_shared_ids(parts.tokenizer, processor.tokenizer)
        seen_of(parts.rows, section.images, image_folder(section))


def route_of(section: groups.RouteTeacherRecipe, parts: Parts) -> dict[int, str]:
    """Return the name of each row's teacher.  Raises RecipeError for a name that is not listed."""
    names = [one.name for one in section.teachers]
    route = {row.row_id: str(row.columns[section.column]) for row in parts.rows}
    unknown = sorted({name for name in route.values() if name not in names})
    if unknown:
        raise RecipeError(
            f"teacher.column: rows have '{unknown[0]}' in their column '{section.column}', but no "
            f"teacher has this name. The teachers are: {', '.join(names)}. Add a teacher, or "
            "change the rows."
        )
    return route


def _route(section: groups.RouteTeacherRecipe, parts: Parts) -> Teacher:
    names, route = [one.name for one in section.teachers], route_of(section, parts)
    balance = None
    if section.token_balance:
        counted = token_balance(parts.train, route, by_tokens=parts.takes_data)
        balance = {name: counted.get(name, 1.0) for name in names}
    teachers = {one.name: load_teacher(one) for one in section.teachers}
    return RoutedTeacher(teachers, route, balance=balance)


def _curriculum(section: groups.CurriculumTeacherRecipe, parts: Parts) -> Teacher:
    teachers = {str(place): load_teacher(one) for place, one in enumerate(section.teachers, 1)}
    return CurriculumTeacher(teachers, parts.train, pace_from=section.pace_from)


def _mutual(section: groups.MutualTeacherRecipe, parts: Parts) -> Teacher:
    assert parts.sample is not None
    peers = [
        build_student(one, base=None, sample=parts.sample, device=parts.device, seed=parts.seed)
        for one in section.peers
    ]
    options = section.model_dump(include={"divergence", "temperature", "ce_weight"})
    tokenizers = [load_tokenizer(one.model, revision=one.revision) for one in section.peers]
    require_one_vocabulary(tokenizers)
    return MutualTeacher(peers, tokenizers[0], **options)


# One builder for each section; a new teacher adds a line here.
_BUILDERS: dict[type, Callable[[Any, Parts], Teacher]] = {
    sections.LocalTeacherRecipe: _local,
    sections.PrunedTeacherRecipe: _pruned,
    self_teachers.AdapterOffTeacherRecipe: _adapter_off,
    sections.OnlineTeacherRecipe: _online,
    self_teachers.ReflexiveTeacherRecipe: _reflexive,
    sections.MultimodalTeacherRecipe: load_multimodal,
    groups.EnsembleTeacherRecipe: _ensemble,
    groups.RouteTeacherRecipe: _route,
    groups.CurriculumTeacherRecipe: _curriculum,
    groups.MutualTeacherRecipe: _mutual,
}
