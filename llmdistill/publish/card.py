"""The model card of a student: its origin, its evaluation, and the recipe that made it."""

from __future__ import annotations

import html
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmdistill import recipe as recipes
from llmdistill.data.sources import hub_name
from llmdistill.evaluation.measure import MEANING, Figures, remarks
from llmdistill.models.embedded import EMBEDDED
from llmdistill.models.embedded import hub_name as model_hub_name

if TYPE_CHECKING:
    from llmdistill.recipe import Recipe, SourceRecipe

PATHS = (  # keys that hold a path
    *("output", "source", "model", "tokenizer", "student", "folder", "image_folder"),
)
# Packages whose versions a card states.
PACKAGES = ("llmdistill", "torch", "transformers", "accelerate")


def figures_table(evaluation: Mapping[str, Figures]) -> list[list[str]]:
    """Return the rows of a table: a header with the names of the models, then one row per figure.

    Figures that no model has are left out.
    """
    columns = {name: asdict(figures) for name, figures in evaluation.items()}
    taken = [key for key in MEANING if any(c[key] is not None for c in columns.values())]
    return [["", *columns]] + [
        [key, *(_number(values[key]) for values in columns.values())] for key in taken
    ]


def model_card(recipe: Recipe, evaluation: Mapping[str, Figures] | None) -> str:
    """Return the card as Markdown with YAML metadata, which `ModelCard.load` reads.

    `evaluation` maps the name of each model to its figures; None leaves the table out.
    """
    from huggingface_hub import ModelCardData

    teachers = dict.fromkeys(name for name, _ in recipe.teacher_sources)
    found = {license_of(name) for name in teachers}
    # One licence only if all teachers have the same.
    terms = found.pop() if len(found) == 1 else None
    data = ModelCardData(
        base_model=model_hub_name(recipe.student.model),
        license=terms or "other",
        datasets=[name for s in recipe.data.train if (name := hub_name(s.source))] or None,
        tags=["distillation", "llmdistill", *sorted({o.kind for o in recipe.objectives})],
        library_name="transformers",
        pipeline_tag="text-generation",
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {shown(Path(recipe.output).name)}",
    ]
    parts.append(_origin(recipe, list(teachers), terms))
    if evaluation:
        parts.append(_measured(recipe, evaluation))
    parts.append(_made(recipe))
    return "\n\n".join(parts) + "\n"


def license_of(name: str, *, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return the licence that the card of a model or dataset states; None if it cannot be read."""
    from huggingface_hub import DatasetCard, ModelCard

    if name in EMBEDDED:
        return EMBEDDED[name].license
    local = Path(os.path.expanduser(name))
    made: type[ModelCard | DatasetCard] = ModelCard if kind == "model" else DatasetCard
    try:
        card = made.load(local / "README.md" if local.is_dir() else name)
    # No card, no network, no such repository, invalid YAML: a licence that cannot be read must not
    # stop a finished run, and the card then states that it is unknown.
    except Exception:
        return None
    stated = card.data.to_dict().get("license")
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated


def _origin(recipe: Recipe, teachers: Sequence[str], license_name: str | None) -> str:
    student = f"`{shown(public_part(recipe.student.model))}`"
    if recipe.student.carve is not None:
        student += f", carved ({_options(recipe.student.carve)})"
    whose = "The teacher's licence" if len(teachers) == 1 else "The licence of all teachers"
    if license_name is not None:
        terms = f"{whose} is {shown(license_name)}."
    elif len(teachers) == 1:
        terms = f"{whose} could not be read. Look it up before you share this model."
    else:
        terms = (
            "The teachers' licences differ or could not be read. Look them up before you share "
            "this model."
        )
    taught = ", ".join(f"`{shown(public_part(name))}`" for name in teachers)
    if recipe.teacher.who:
        taught += f" ({shown(recipe.teacher.who)})"
    return (
        "This is a causal language model that was distilled with "
        f"[llmdistill](https://pypi.org/project/llmdistill/).\n\n- **Student**: {student}\n- "
        f"**Teacher**: {taught}\n- **Rollout**: "
        f"{_describe(recipe.rollout)}\n- **Objectives**: "
        f"{'; '.join(_describe(o) for o in recipe.objectives)}\n- **Data**: "
        f"{_sources(recipe.data.train)}\n\n{terms}"
    )


def _measured(recipe: Recipe, evaluation: Mapping[str, Figures]) -> str:
    header, *rows = figures_table(evaluation)
    lines = ["| " + " | ".join([*header, "meaning"]) + " |", "|" + "---|" * (len(header) + 1)]
    lines += ["| " + " | ".join([*row, MEANING[row[0]]]) + " |" for row in rows]
    rows_from = _sources(recipe.data.eval)
    if recipe.data.hold_back:
        rows_from = f"{recipe.data.hold_back} held-out rows of {_sources(recipe.data.train)}"
    said = "".join(f"\n\n{sentence}" for sentence in remarks(evaluation))
    return f"## Evaluation\n\nMeasured on {rows_from}:\n\n" + "\n".join(lines) + said


def _sources(sources: Sequence[SourceRecipe]) -> str:
    return ", ".join(f"`{shown(public_part(source.source))}`" for source in sources)


def _made(recipe: Recipe) -> str:
    return (
        f"## How it was made\n\nThe model was made by `llmdistill train` with {made_with()}, "
        "from this recipe:\n\n"
        f"```yaml\n{_fenced(public_dump(recipe))}```"
    )


def public_part(name: str) -> str:
    """Return a name that others can use, or the last part of a path on this machine.

    A path can hold the names of people and machines.
    """
    is_local = (
        *(name.startswith((".", "/", "~")), Path(name).exists(), "\\" in name),
        *(name.count("/") > 1 and ":" not in name, hub_name(name) is None),
    )
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if any(is_local) else name


def public_model(name: str, *, is_remote: bool = True) -> str:
    """Return the name of a model that others can use, or the last part of a path.

    The names of a server can have many parts, but they can also be paths on its machine.
    """
    if not is_remote:
        return public_part(name)
    is_path = name.startswith((".", "/", "~")) or "\\" in name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if is_path else name


def public_dump(recipe: Recipe | recipes.GenerationRecipe) -> str:
    """Return the recipe as YAML without local paths and without the address of a server."""

    def public(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            kept = {name: one for name, one in value.items() if name not in ("url", "key_from")}
            is_remote = kept.get("kind") == "remote"
            # Options of a user's function can hold any path.
            inside = key if key == "options" else ""
            return {
                name: public_model(one)
                if is_remote and name == "model"
                else public(one, inside or name)
                for name, one in kept.items()
            }
        if isinstance(value, list):
            return [public(one, key) for one in value]
        if not isinstance(value, str):
            return value
        if key == "function" or (key == "options" and ("/" in value or "\\" in value)):
            return re.split(r"[\\/]", value)[-1]
        return public_part(value) if key in PATHS else value

    return recipes.dump_data(public(recipes.as_data(recipe)))


def made_with() -> str:
    """Return the packages whose versions matter, with their versions."""
    return ", ".join(f"{name} {_version(name)}" for name in PACKAGES)


def _describe(section: recipes.Strict) -> str:
    """Return a section of a recipe in one line: its kind, and the options that are not defaults."""
    kind, options = shown(getattr(section, "kind", "")), _options(section)
    return f"{kind} ({options})" if kind and options else kind or options


def _options(section: recipes.Strict) -> str:
    changed = section.model_dump(exclude_defaults=True, exclude={"kind"})
    values = {key: getattr(section, key) for key in changed}
    return ", ".join(
        f"{shown(key)}: {_describe(value)}"
        if isinstance(value, recipes.Strict)
        else f"{shown(key)} {shown(str(value))}"
        for key, value in values.items()
    )


def _number(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def shown(text: str) -> str:
    """Return text from a recipe or another card as plain Markdown text.

    It cannot contain HTML tags, end a table cell, or start or end a code span.
    """
    return html.escape(text, quote=False).replace("|", "\\|").replace("`", "'").replace("\n", " ")


def _fenced(text: str) -> str:
    # A name in the recipe must not be able to close the code block around it.
    return text.replace("```", "'''")
