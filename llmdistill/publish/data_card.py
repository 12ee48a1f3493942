"""The card of a generated data set, and its way to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmdistill import recipe as recipes
from llmdistill.data.sources import hub_name
from llmdistill.errors import CheckpointError
from llmdistill.publish.card import license_of, made_with, shown

# How it was written, not what it is.
RECORDS = ("calls.jsonl", "rows.jsonl", "log.jsonl", "gaps.json", "spoken-*.jsonl", "*.new")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))
INTENDED = """## Intended use

Training and distilling language models. The text was written by a language model and not checked by
people: it holds errors, and the licence of its teacher decides what may be done with it."""


@dataclass(frozen=True)
class Outcome:
    """Rows of each split, why tasks were dropped, how many of the kept ones each variant of the
    generator made, and the teacher's revision.
    """

    sizes: Mapping[str, int]
    dropped: Mapping[str, int]
    variants: Mapping[str, int]
    revision: str


def push(folder: Path, name: str) -> None:
    """Uploads the data set, without the records of how it was written.  A new one is private.

    Raises CheckpointError where `name` is there already and public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    if not api.dataset_info(name).private:
        raise CheckpointError(
            f"--push: {name} is a public data set, and nothing is published by chance. Make it "
            f"private first, or take another name. The data set is in {folder}."
        )
    api.upload_folder(
        repo_id=name,
        repo_type="dataset",
        folder_path=str(folder),
        ignore_patterns=list(RECORDS),
        delete_patterns=["train.*", "held.*"],  # a split that is no more
    )


def data_card(recipe: recipes.GenerationRecipe, outcome: Outcome) -> str:
    """The card as Markdown with its metadata; parses with `DatasetCard.load`."""
    from huggingface_hub import DatasetCardData

    terms = license_of(recipe.teacher.model)
    languages = [code for f in recipe.filters if f.kind == "language" for code in f.languages]
    files = [{"split": name, "path": f"{name}.parquet"} for name in outcome.sizes]
    data = DatasetCardData(
        license=terms or "other",
        license_name=None if terms else "see-the-teacher",
        language=languages or None,
        size_categories=[_size(sum(outcome.sizes.values()))],
        task_categories=["text-generation"],
        tags=["synthetic", "instruction", "distillation", "llmdistill"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return (
        "\n\n".join(
            [
                f"---\n{data.to_yaml()}\n---",
                f"# {shown(recipe.output.rstrip('/').split('/')[-1])}",
                _origin(recipe, terms, outcome.revision),
                _rows(recipe, outcome),
                INTENDED,
                f"## How it was made\n\nWith {made_with()}, and this recipe, which is "
                "`recipe.yaml` here:\n\n```bash\nllmdistill generate recipe.yaml\n```\n\n"
                f"```yaml\n{recipes.dump(recipe).replace('```', chr(39) * 3)}```",
            ]
        )
        + "\n"
    )


def _size(rows: int) -> str:
    """The Hub's name for a number of rows."""
    return next((name for bound, name in SIZES if rows < bound), "n>1M")


def _origin(recipe: recipes.GenerationRecipe, terms: str | None, revision: str) -> str:
    stated = (
        f"The teacher's licence is {shown(terms)}."
        if terms
        else "The teacher's licence could not be read: look it up before you share this."
    )
    return (
        "Instructions and answers written by a language model, with "
        f"[llmdistill](https://pypi.org/project/llmdistill/).\n\n"
        f"- **Teacher**: `{shown(recipe.teacher.model)}`"
        f"{f', {shown(revision)}' if revision else ''}\n"
        f"- **Generator**: {shown(recipe.generator.kind)}\n"
        f"- **Made from**: {_material(recipe)}\n\n{stated}"
    )


def _material(recipe: recipes.GenerationRecipe) -> str:
    """The rows that were shown or asked, with the licences that their cards state."""
    answer = recipe.generator
    shown_ones = () if answer.kind == "magpie" else recipe.seeds
    sources = getattr(answer, "prompts", None) or getattr(answer, "pool", None) or shown_ones
    listed = [f"`{shown(one.source)}`{_terms(one.source)}" for one in sources]
    return ", ".join(listed) or "nothing but the teacher's chat template"


def _terms(source: str) -> str:
    if source == "seed_tasks":
        return " (of llmdistill, apache-2.0)"
    name = hub_name(source)
    terms = name and license_of(name, kind="dataset")
    return f" ({shown(terms)})" if terms else ""


def _rows(recipe: recipes.GenerationRecipe, outcome: Outcome) -> str:
    lines = ["| split | rows |", "|---|---|"]
    lines += [f"| {name} | {size} |" for name, size in outcome.sizes.items()]
    columns = "`messages`" if recipe.columns == "messages" else "`instruction`, `input`, `output`"
    kept, dropped = sum(outcome.sizes.values()), sum(outcome.dropped.values())
    reasons = sorted(outcome.dropped.items(), key=lambda item: -item[1])
    why = ", ".join(f"{reason} {number}" for reason, number in reasons) or "none"
    ways = ", ".join(f"{way} {number}" for way, number in sorted(outcome.variants.items()))
    return (
        "## Rows\n\n" + "\n".join(lines) + f"\n\nColumns: {columns}, and `id`, `variant`, "
        "`generator`, `teacher`, `revision`, `sampling`, `seed`, `prompt_hash`: where each row "
        "comes from. `id` is the call and the place in it; with `seed` it keys what was drawn.\n\n"
        f"Of {kept + dropped} tasks {kept} were kept. Dropped: {shown(why)}."
        + (f" Kept, by variant: {shown(ways)}." if ways else "")
    )
