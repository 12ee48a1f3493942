"""The licences of what a student was made of, and the one that its card can state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmdistill.data.sources import SEED_TASKS, hub_name
from llmdistill.models.embedded import EMBEDDED
from llmdistill.publish.names import public_part
from llmdistill.recipe import Recipe

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
    """Return the student's base, its teachers and its datasets with their licences."""
    found = [Part("student", recipe.student.model, read_licence(recipe.student.model))]
    for name in dict.fromkeys(name for name, _ in recipe.teacher_sources):
        found.append(Part("teacher", name, read_licence(name)))
    for source in dict.fromkeys(one.source for one in recipe.data.train):
        found.append(Part("data", source, licence_of_data(source)))
    return [part._replace(name=public_part(part.name)) for part in found]


def common(parts: Sequence[Part]) -> Licence:
    """Return the licence of all parts if they have the same one; otherwise `other`.

    Parts whose licence cannot be read have another one as far as anyone can know.
    """
    found = {part.licence for part in parts}
    if len(found) == 1 and (one := found.pop()) is not None:
        return one
    return Licence(OTHER, "see-the-card")


def read_licence(name: str, *, kind: Literal["model", "dataset"] = "model") -> Licence | None:
    """Return the licence that the card of a model or dataset states; None if it cannot be read."""
    from huggingface_hub import DatasetCard, ModelCard

    if name in EMBEDDED:
        return Licence(EMBEDDED[name].license)
    local = Path(os.path.expanduser(name))
    made: type[ModelCard | DatasetCard] = ModelCard if kind == "model" else DatasetCard
    try:
        card = made.load(local / "README.md" if local.is_dir() else name)
    # No card, no network, no such repository, invalid YAML: a licence that cannot be read must not
    # stop a finished run, and the card then states that it is unknown.
    except Exception:
        return None
    data = card.data.to_dict()
    stated = _text(data.get("license"))
    if stated is None:
        return None
    return Licence(stated, _text(data.get("license_name")), _text(data.get("license_link")))


def licence_of_data(source: str) -> Licence | None:
    """Return the licence that the card of a dataset states: of a folder, or on the Hub."""
    if source == SEED_TASKS:
        return Licence(SEED_TASKS_LICENSE)
    folder = Path(os.path.expanduser(source))
    name = str(folder) if folder.is_dir() else hub_name(source)
    return read_licence(name, kind="dataset") if name else None


def _text(stated: Any) -> str | None:
    """Return what a card states as one text; a list is joined."""
    if isinstance(stated, list):
        return ", ".join(map(str, stated)) or None
    return None if stated is None else str(stated)
