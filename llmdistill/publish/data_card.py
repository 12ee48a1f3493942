"""The card of a generated data set, and its way to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmdistill import recipe as recipes
from llmdistill.publish.card import license_of, made_with, shown

# How it was written, not what it is.
RECORDS = ("calls.jsonl", "rows.jsonl", "log.jsonl", "gaps.json")
INTENDED = """## Intended use

Training and distilling language models. The text was written by a language model and not checked by
people: it holds errors, and the licence of its teacher decides what may be done with it."""


@dataclass(frozen=True)
class Outcome:
    """Rows of each split, and why tasks were dropped."""

    sizes: Mapping[str, int]
    dropped: Mapping[str, int]


def push(folder: Path, name: str, *, private: bool = True) -> None:
    """Uploads the data set, without the records of how it was written."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=name, repo_type="dataset", folder_path=str(folder), ignore_patterns=list(RECORDS)
    )


def data_card(recipe: recipes.GenerationRecipe, outcome: Outcome) -> str:
    """The card as Markdown with its metadata; parses with `DatasetCard.load`."""
    from huggingface_hub import DatasetCardData

    terms = license_of(recipe.teacher.model)
    files = [{"split": name, "path": f"{name}.parquet"} for name in outcome.sizes]
    data = DatasetCardData(
        license=terms or "other",
        task_categories=["text-generation"],
        tags=["synthetic", "instruction", "distillation", "llmdistill"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return (
        "\n\n".join(
            [
                f"---\n{data.to_yaml()}\n---",
                f"# {shown(recipe.output.rstrip('/').split('/')[-1])}",
                _origin(recipe, terms),
                _rows(recipe, outcome),
                INTENDED,
                "## How it was made\n\n"
                f"`llmdistill generate` with {made_with()}, and this recipe:\n\n"
                f"```yaml\n{recipes.dump(recipe).replace('```', chr(39) * 3)}```",
            ]
        )
        + "\n"
    )


def _origin(recipe: recipes.GenerationRecipe, terms: str | None) -> str:
    stated = (
        f"The teacher's licence is {shown(terms)}."
        if terms
        else "The teacher's licence could not be read: look it up before you share this."
    )
    return (
        "Instructions and answers written by a language model, with "
        f"[llmdistill](https://pypi.org/project/llmdistill/).\n\n"
        f"- **Teacher**: `{shown(recipe.teacher.model)}`\n"
        f"- **Generator**: {shown(recipe.generator.kind)}\n\n{stated}"
    )


def _rows(recipe: recipes.GenerationRecipe, outcome: Outcome) -> str:
    lines = ["| split | rows |", "|---|---|"]
    lines += [f"| {name} | {size} |" for name, size in outcome.sizes.items()]
    columns = "`messages`" if recipe.columns == "messages" else "`instruction`, `input`, `output`"
    kept, dropped = sum(outcome.sizes.values()), sum(outcome.dropped.values())
    reasons = sorted(outcome.dropped.items(), key=lambda item: -item[1])
    why = ", ".join(f"{reason} {number}" for reason, number in reasons) or "none"
    return (
        "## Rows\n\n" + "\n".join(lines) + f"\n\nColumns: {columns}, and `id`, `generator`, "
        "`teacher`, `revision`, `sampling`, `seed`, `prompt_hash`: where each row comes from.\n\n"
        f"Of {kept + dropped} tasks {kept} were kept. Dropped: {shown(why)}."
    )
