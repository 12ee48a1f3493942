"""The card of a generated data set, and its way to the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmdistill import recipe as recipes
from llmdistill.data.sources import hub_name
from llmdistill.errors import CheckpointError
from llmdistill.publish.card import license_of, made_with, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# How it was written, not what it is.
RECORDS = (
    *("calls.jsonl", "rows.jsonl", "log.jsonl", "gaps.json", "spoken-*.jsonl", "*.new"),
    "recipe.yaml",  # holds paths and addresses of whoever made it; the card shows it without
)
SIZE_CATEGORIES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (10**6, "100K<n<1M"),
)
INTENDED = """## Intended use

Training and distilling language models. What a language model wrote here was not checked by people:
it holds errors, and the licences of the teacher and of what it was shown decide what may be done
with it."""


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
    """Uploads the data set, without the records of how it was written."""
    api = prepare_push(name)
    with _clear_errors(name):
        _upload(api, folder, name)


def prepare_push(name: str) -> HfApi:
    """Sees to it that there is a private data set of this name; a new one is private.

    Raises CheckpointError where the Hub cannot be reached, does not let us in, or has a public one.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _clear_errors(name):
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        private = api.dataset_info(name).private
    if not private:
        raise CheckpointError(
            f"{name} is a public dataset on the Hub, but llmdistill pushes only to private ones. "
            "Make it private, or push to another name."
        )
    return api


@contextlib.contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no network, not logged in, no right to write there
        raise CheckpointError(
            f"cannot use {name} on the Hub: {type(error).__name__}: {error}. Log in with 'hf auth "
            "login', or run without pushing: the dataset stays in its folder. To upload it later, "
            "pass resume and pass push."
        ) from error


def _upload(api: HfApi, folder: Path, name: str) -> None:
    api.upload_folder(
        repo_id=name,
        repo_type="dataset",
        folder_path=str(folder),
        ignore_patterns=list(RECORDS),
        delete_patterns=["train.*", "test.*", "held.*"],  # splits that are no more
    )


def data_card(recipe: recipes.GenerationRecipe, outcome: Outcome) -> str:
    """The card as Markdown with its metadata; parses with `DatasetCard.load`."""
    from huggingface_hub import DatasetCardData

    terms = _license(recipe)
    stated = terms if terms and not recipe.generator.has_given_prompts else None
    languages = [code for one in recipe.filters for code in one.kept_languages]
    files = [{"split": name, "path": f"{name}.parquet"} for name in outcome.sizes]
    data = DatasetCardData(
        license=stated or "other",
        license_name=None if stated else "see-below",
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
                f"## How it was made\n\nWith {made_with()}, and this as `recipe.yaml`:\n\n"
                "```bash\nllmdistill generate recipe.yaml\n```\n\n"
                f"```yaml\n{recipes.dump(_public(recipe)).replace('```', chr(39) * 3)}```",
            ]
        )
        + "\n"
    )


def _license(recipe: recipes.GenerationRecipe) -> str | None:
    """The teacher's; the name of a model on a server is no name on the Hub."""
    teacher = recipe.teacher
    return teacher.stated_license if teacher.is_remote else license_of(teacher.model)


def _public(recipe: recipes.GenerationRecipe) -> recipes.GenerationRecipe:
    """Without the folders and addresses of whoever ran it."""
    changes = {"output": Path(recipe.output).name, "teacher": recipe.teacher.public()}
    return recipe.model_copy(update=changes)


def _size(rows: int) -> str:
    """The Hub's name for a number of rows."""
    return next((name for bound, name in SIZE_CATEGORIES if rows < bound), "n>1M")


def _origin(recipe: recipes.GenerationRecipe, terms: str | None, revision: str) -> str:
    stated = (
        f"The teacher's licence is {shown(terms)}."
        if terms
        else "The teacher's licence could not be read: look it up before you share this."
    )
    given = recipe.generator.has_given_prompts
    written = "Answers to given prompts" if given else "Instructions and answers"
    return (
        f"{written}, written by a language model, with "
        f"[llmdistill](https://pypi.org/project/llmdistill/).\n\n"
        f"- **Teacher**: `{shown(recipe.teacher.model)}`"
        f"{f', {shown(revision)}' if revision else ''}\n"
        f"- **Generator**: {shown(recipe.generator.kind)}\n"
        f"- **Made from**: {_material(recipe)}\n\n{stated}"
    )


def _material(recipe: recipes.GenerationRecipe) -> str:
    """The rows that were shown or asked, with the licences that their cards state."""
    names = [one.source for one in recipe.sources]
    listed = [f"`{shown(Path(name).name)}`{_terms(name)}" for name in names]
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
    columns = "`messages`" if recipe.format == "messages" else "`instruction`, `input`, `output`"
    kept, dropped = sum(outcome.sizes.values()), sum(outcome.dropped.values())
    reasons = sorted(outcome.dropped.items(), key=lambda item: -item[1])
    why = ", ".join(f"{reason} {number}" for reason, number in reasons) or "none"
    ways = ", ".join(f"{way} {number}" for way, number in sorted(outcome.variants.items()))
    return (
        "## Rows\n\n" + "\n".join(lines) + f"\n\nColumns: {columns}, and `id`, `variant`, "
        "`generator`, `teacher`, `revision`, `sampling`, `seed`, `prompt_hash`: where each row "
        "comes from. `id` is the call and the place in it; with `seed` it keys what was drawn. "
        f"About {recipe.test_share:.0%} of the questions, by a hash of their text, are in `test`."
        "\n\n"
        f"Of {kept + dropped} tasks {kept} were kept. Dropped: {shown(why)}."
        + (f" Kept, by variant: {shown(ways)}." if ways else "")
    )
