"""The card of a generated dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmdistill import recipe as recipes
from llmdistill.publish.card import made_with
from llmdistill.publish.licences import licence_of_data, read_licence
from llmdistill.publish.names import public_dump, public_model, public_part, shown
from llmdistill.recipe.generation import GenerationTeacher

SIZE_CATEGORIES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (10**6, "100K<n<1M"),
)
INTENDED = """## Intended use

This dataset is meant for training and distilling language models. Its text was written by a
language model and was not checked by people, so it contains errors. The licences of the teacher,
and of the data that the teacher was shown, determine how it may be used."""
# Columns that record where a row comes from.
ABOUT = ("id", "variant", "generator", "teacher", "revision", "sampling", "seed", "prompt_hash")
UNKNOWN = "licence not known"


@dataclass(frozen=True)
class Outcome:
    """What a run made, as its card states it.

    - `sizes`: number of rows in each split.
    - `dropped`: number of dropped tasks by reason.
    - `variants`: number of kept tasks by variant of the generator.
    - `copies`: number of rows that equal another row.
    - `columns`: names of the columns.
    - `revision`: the teacher's revision, or "".
    """

    sizes: Mapping[str, int]
    dropped: Mapping[str, int]
    variants: Mapping[str, int]
    revision: str
    copies: int = 0
    columns: Sequence[str] = ()


def data_card(recipe: recipes.GenerationRecipe, outcome: Outcome) -> str:
    """Return the card as Markdown with YAML metadata, which `DatasetCard.load` reads."""
    from huggingface_hub import DatasetCardData

    terms = _license(recipe.teacher)
    found = {terms, *(_stated(one.source) for one in recipe.sources)}
    if recipe.judge and recipe.judge.teacher:
        found.add(_license(recipe.judge.teacher))
    if recipe.generator.kind == "python":  # nobody knows what its function shows the teacher
        found.add(None)
    # One licence only if the models and all that the teacher was shown have the same.
    stated = terms if len(found) == 1 and terms and "," not in terms else None
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
                f"## How it was made\n\nThe dataset was made with {made_with()}, by this command:"
                "\n\n```bash\nllmdistill generate recipe.yaml\n```\n\n"
                "The file `recipe.yaml` contained:\n\n"
                f"```yaml\n{public_dump(recipe).replace('```', chr(39) * 3)}```",
            ]
        )
        + "\n"
    )


def _license(teacher: GenerationTeacher) -> str | None:
    """Return a model's licence: as the recipe states it for a server, else as its card does."""
    # A server's name for a model may belong to another repository on the Hub.
    if teacher.is_remote:
        return teacher.stated_license
    found = read_licence(teacher.model)
    return None if found is None else found.id


def _stated(source: str) -> str | None:
    """Return the licence of a source of rows in one word."""
    found = licence_of_data(source)
    return None if found is None else found.name or found.id


def _size(rows: int) -> str:
    """Return the Hub's size category for a number of rows."""
    return next((name for bound, name in SIZE_CATEGORIES if rows < bound), "n>1M")


def _origin(recipe: recipes.GenerationRecipe, terms: str | None, revision: str) -> str:
    given = recipe.generator.has_given_prompts
    made = "instructions and answers" if recipe.generator.answers else "instructions"
    written = "answers to given prompts" if given else made
    stated = (
        f"The teacher's licence is {shown(terms)}."
        if terms
        else "The teacher's licence could not be read. Look it up before you share this dataset."
    )
    teacher = public_model(recipe.teacher.model, is_remote=recipe.teacher.is_remote)
    return (
        f"This dataset contains {written}, written by a language model. It was generated with "
        f"[llmdistill](https://pypi.org/project/llmdistill/).\n\n"
        f"- **Teacher**: `{shown(teacher)}`{f', revision {shown(revision)}' if revision else ''}\n"
        f"- **Generator**: {shown(recipe.generator.kind)}\n{_judge(recipe)}"
        f"- **Made from**: {_material(recipe)}\n\n"
        f"{stated} The dataset has one licence only if the teacher and everything that it was made "
        "from have the same."
    )


def _judge(recipe: recipes.GenerationRecipe) -> str:
    if recipe.judge is None:
        return ""
    judge = recipe.judge.teacher
    name = "the teacher"
    if judge is not None:
        name = f"`{shown(public_model(judge.model, is_remote=judge.is_remote))}`"
        name += f" ({shown(_license(judge) or UNKNOWN)})"
    return f"- **Judge**: {name}, for {' and '.join(recipe.judge.aspects)} from 1 to 10\n"


def _material(recipe: recipes.GenerationRecipe) -> str:
    """Return the sources that the teacher saw, with the licences that their cards state."""
    listed = [
        f"`{shown(public_part(one.source))}` ({shown(_stated(one.source) or UNKNOWN)})"
        for one in recipe.sources
    ]
    own = recipe.generator.kind == "python"
    return ", ".join(listed) or ("a Python function" if own else "only the teacher's chat template")


def _rows(recipe: recipes.GenerationRecipe, outcome: Outcome) -> str:
    lines = ["| split | rows |", "|---|---|"]
    lines += [f"| {name} | {size} |" for name, size in outcome.sizes.items()]
    columns = ", ".join(f"`{shown(name)}`" for name in outcome.columns if name not in ABOUT)
    kept, dropped = sum(outcome.sizes.values()), sum(outcome.dropped.values())
    reasons = sorted(outcome.dropped.items(), key=lambda item: -item[1])
    why = ", ".join(f"{reason} {number}" for reason, number in reasons) or "none"
    ways = ", ".join(f"{way} {number}" for way, number in sorted(outcome.variants.items()))
    return (
        "## Rows\n\n" + "\n".join(lines) + f"\n\nThe columns are {columns or '`messages`'}, and "
        "those that record where a row comes from: `id`, `variant`, `generator`, `teacher`, "
        "`revision`, `sampling`, `seed` and `prompt_hash`. `id` is the number of the call and the "
        "position of the task in it. Together with `seed`, it determines the random choices for "
        "the row. About "
        f"{recipe.test_share:.0%} of the questions, chosen by a hash of their text, are in `test`."
        "\n\n"
        f"{kept} of {kept + dropped} tasks were kept. Dropped by reason: {shown(why)}."
        + (f" Kept by variant: {shown(ways)}." if ways else "")
        + (f" {outcome.copies} rows equal another row." if outcome.copies else "")
    )
