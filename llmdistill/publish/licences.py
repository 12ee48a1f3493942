"""The licences of what a student was made of, and the one that its card can state."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from llmdistill.data.sources import SEED_TASKS, hub_name
from llmdistill.models.embedded import EMBEDDED
from llmdistill.publish.names import public_part
from llmdistill.recipe import Recipe

SEVERAL = "see-the-card"  # the name of a licence that is a list in the card
OTHER = "other"  # the Hub's word for a licence that has no identifier there
SEED_TASKS_LICENSE = "apache-2.0"  # of this package, which they are a part of


class Licence(NamedTuple):
    """A licence as a card states it: its identifier, and the name and link of an `other` one."""

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        told = self.name or self.id
        return f"{told} ({self.link})" if self.link else told


class Part(NamedTuple):
    """Something that a student was made of, with its licence; None if it could not be read."""

    what: str
    name: str
    licence: Licence | None


def parts_of(recipe: Recipe) -> list[Part]:
    """Return the student's base, its teachers and its datasets with their licences.

    Of a recipe of several runs, the students that teach in a later run are teachers.
    """
    made = {str(Path(stage.output) / "student") for stage in recipe.stages}
    sources = [name for stage in recipe.stages for name, _ in stage.teacher_sources]
    sources += [stage.student.model for stage in recipe.stages[:-1]]
    found = [Part("student", recipe.student.model, read_licence(recipe.student.model))]
    for name in dict.fromkeys(sources):
        if name not in made:
            found.append(Part("teacher", name, read_licence(name)))
    for source in dict.fromkeys(one.source for one in recipe.data.train):
        found.append(Part("data", source, licence_of_data(source)))
    return [part._replace(name=public_part(part.name)) for part in found]


def _compared(licence: Licence | None) -> Licence | None:
    """Return what tells licences apart: the identifier, or of another one also name and link."""
    return licence if licence is None or licence.id == OTHER else Licence(licence.id)


def common(parts: Sequence[Part]) -> Licence:
    """Return the licence of all parts if they have the same one; otherwise `other`.

    Parts whose licence cannot be read have another one as far as anyone can know.
    """
    found = {_compared(part.licence) for part in parts}
    if len(found) == 1 and (one := found.pop()) is not None:
        return one
    return Licence(OTHER, SEVERAL)


def read_licence(name: str, *, kind: Literal["model", "dataset"] = "model") -> Licence | None:
    """Return the licence that the card of a model or dataset states; None if it cannot be read."""
    from huggingface_hub import DatasetCard, ModelCard

    if name in EMBEDDED:
        return Licence(EMBEDDED[name].license)
    local = Path(os.path.expanduser(name))
    if local.is_file():  # weights, such as a GGUF file, and no card
        return None
    made: type[ModelCard | DatasetCard] = ModelCard if kind == "model" else DatasetCard
    try:
        card = made.load(local / "README.md" if local.is_dir() else name)
    # No card, no network, no such repository, invalid YAML: a licence that cannot be read must not
    # stop a finished run, and the card then states that it is unknown.
    except Exception:
        return None
    data = card.data.to_dict()
    stated, link = data.get("license"), str(data.get("license_link") or "")
    if isinstance(stated, list):
        return Licence(OTHER, _slug(" and ".join(map(str, stated))))
    if not stated:
        return None
    # A link within the repository of the other model leads nowhere from ours.
    where = link if link.startswith("https://") else None
    name = data.get("license_name")
    return Licence(str(stated), _slug(str(name)) if name else None, where)


def licence_of_data(source: str) -> Licence | None:
    """Return the licence that the card of a dataset states: of a folder, or on the Hub."""
    if source == SEED_TASKS:
        return Licence(SEED_TASKS_LICENSE)
    folder = Path(os.path.expanduser(source))
    name = str(folder) if folder.is_dir() else hub_name(source)
    return read_licence(name, kind="dataset") if name else None


def _slug(text: str) -> str:
    """Return a name in the form that the Hub takes: lower case, and dashes between the words."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
