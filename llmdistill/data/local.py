"""Files and folders that a recipe names: a typo is found before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from llmdistill.data.sources import SEED_TASKS, hub_name
from llmdistill.errors import DataError, ModelError
from llmdistill.recipe import GenerationRecipe, Recipe


def require_local(recipe: Recipe | GenerationRecipe) -> None:
    """Raise DataError or ModelError for the first file or folder that does not exist.

    Names that may be on the Hub are not looked at, nor what an earlier part of the run makes.
    """
    made: list[Path] = []
    if isinstance(recipe, Recipe):
        if recipe.generate is not None:
            require_local(recipe.generate)
            made = [Path(recipe.generate.output).resolve()]
        first = recipe.stages[0]
        sources = [*first.data.train, *first.data.eval]
        models = [first.student.model, *(name for name, _ in first.teacher_sources)]
        models += [one.model for one in (recipe.evaluate.against,) if one is not None]
    else:
        sources, known = list(recipe.sources), recipe.teacher.tokenizer_source
        models = [known[0]] if known else []
    for source in (one.source for one in sources):
        if not _exists(source, made):
            raise DataError(f"no such file: {source}. Check the path.")
    for name in models:
        if _is_path(name) and not Path(os.path.expanduser(name)).exists():
            what = "file" if name.endswith(".gguf") else "model folder"
            raise ModelError(f"no such {what}: {name}")


def _exists(source: str, made: list[Path]) -> bool:
    path = Path(os.path.expanduser(source))
    if source == SEED_TASKS or hub_name(source) is not None or path.exists():
        return True
    folder, colon, _ = source.rpartition(":")
    if colon and Path(os.path.expanduser(folder)).is_dir():  # folder:split
        return True
    return any(one in (path.resolve(), *path.resolve().parents) for one in made)


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".gguf")
