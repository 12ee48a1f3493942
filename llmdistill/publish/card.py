"""The model card of a student: what it is, what it was made of, how good it is, and how to use it.

The Hub's front end shows it as the page of the model, so it states nothing that a run has not
measured, and shows no path or address of the machine that made it.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill import recipe as recipes
from llmdistill.data.sources import hub_name
from llmdistill.evaluation.measure import MEANING, Figures, remarks
from llmdistill.models.embedded import hub_name as model_hub_name
from llmdistill.publish.facts import PACKAGES, Facts, version
from llmdistill.publish.licences import SEVERAL, Part, common, parts_of
from llmdistill.publish.names import fenced, public_dump, public_part, shown
from llmdistill.publish.papers import Paper, papers_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from llmdistill.recipe import Recipe, SourceRecipe

HOMEPAGE = "https://pypi.org/project/llmdistill/"
# The direction of each divergence, in words.
DIRECTIONS = {
    "forward_kl": "KL(teacher, student): the student covers all that the teacher might say",
    "reverse_kl": "KL(student, teacher): the student concentrates on what the teacher prefers",
    "jsd": "generalised Jensen-Shannon: beta 0 is KL(teacher, student), beta 1 is KL(student, "
    "teacher)",
    "skew_forward_kl": "KL(teacher, mixture of both): close to KL(teacher, student)",
    "skew_reverse_kl": "KL(student, mixture of both): close to KL(student, teacher)",
    "tvd": "total variation distance, which has no direction",
    "adaptive_kl": "KL(teacher, student) and KL(student, teacher), weighted at each token",
    "alpha_beta": "the alpha-beta divergence of the teacher from the student",
}
LIMITS = """The student imitates its teacher, so it has the teacher's errors and biases, and more of
its own: it is smaller. The figures above describe the rows that they were measured on, and nothing
else. Nobody has tested this model for safety."""
IN_PROGRESS = (
    "> **Training is in progress.** These are the weights of a checkpoint. They have not been "
    "measured, and the student and its final card will replace them."
)


def figures_table(
    evaluation: Mapping[str, Figures], more: Mapping[str, Mapping[str, Any]] | None = None
) -> list[list[str]]:
    """Return the rows of a table: a header with the names of the models, then one row per figure.

    `more` has nested figures of some models, which get rows such as `forgetting.kl_start_text`.
    Figures that no model has are left out.
    """
    columns = {
        name: asdict(figures) | _flat((more or {}).get(name, {}))
        for name, figures in evaluation.items()
    }
    known = dict.fromkeys([*MEANING, *(key for values in columns.values() for key in values)])
    taken = [key for key in known if any(c.get(key) is not None for c in columns.values())]
    return [["", *columns]] + [
        [key, *(_number(values.get(key)) for values in columns.values())] for key in taken
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested figures under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def model_card(
    recipe: Recipe,
    evaluation: Mapping[str, Figures] | None,
    facts: Facts | None = None,
    plots: Mapping[str, str] | None = None,
    *,
    in_progress: bool = False,
) -> str:
    """Return the card as Markdown with YAML metadata, which `ModelCard.load` reads.

    Args:
        recipe: The recipe of the run.
        evaluation: The figures of each model by its name; None leaves the table out.
        facts: What the run took; None leaves out time, tokens and machine.
        plots: File names and titles of the charts in the folder `plots` next to the card.
        in_progress: Whether the card is uploaded before the run has ended.
    """
    parts = parts_of(recipe)
    sections = [
        f"---\n{_metadata(recipe, evaluation, parts).to_yaml()}\n---",
        f"# {shown(Path(recipe.output).name)}",
        *([IN_PROGRESS] if in_progress else []),
        _origin(recipe, facts),
        _usage(recipe),
    ]
    if evaluation:
        sections.append(_measured(recipe, evaluation, plots or {}))
    sections += [_made(recipe, facts), _licences(parts), f"## Limits\n\n{LIMITS}"]
    if papers := papers_of(recipe):
        sections.append(_cited(papers))
    return "\n\n".join(sections) + "\n"


def summary(recipe: Recipe) -> str:
    """Return in one sentence who learns what from whom."""
    teachers = " and ".join(
        public_part(n) for n in dict.fromkeys(n for n, _ in recipe.teacher_sources)
    )
    student = public_part(recipe.student.model)
    carved = f", carved ({_options(recipe.student.carve)})" if recipe.student.carve else ""
    matched = " and ".join(dict.fromkeys(_matched(one) for one in recipe.objectives))
    return (
        f"{teachers} teaches {student}{carved}, on responses of {recipe.rollout.who_writes}. The "
        f"student matches {matched}."
    )


def _metadata(
    recipe: Recipe, evaluation: Mapping[str, Figures] | None, parts: Sequence[Part]
) -> Any:
    from huggingface_hub import ModelCardData

    licence, sources = common(parts), [one.source for one in recipe.data.train]
    is_adapter = recipe.student.peft is not None and recipe.student.peft.save == "adapter"
    named = {
        "model_name": Path(recipe.output).name,
        "eval_results": list(_results(recipe, evaluation)),
    }
    return ModelCardData(
        base_model=model_hub_name(recipe.student.model),
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        datasets=list(dict.fromkeys(filter(None, map(hub_name, sources)))) or None,
        tags=_tags(recipe),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        **(named if named["eval_results"] else {}),  # type: ignore[arg-type]
    )


def _tags(recipe: Recipe) -> list[str]:
    kinds = {one.kind for one in recipe.objectives} | {recipe.rollout.kind, recipe.teacher.kind}
    return ["distillation", "knowledge-distillation", "llmdistill", *sorted(kinds)]


def _results(recipe: Recipe, evaluation: Mapping[str, Figures] | None) -> Iterator[EvalResult]:
    """Yield the student's figures for the `model-index`, which leaderboards read."""
    from huggingface_hub import EvalResult

    rows = recipe.data.eval or recipe.data.train
    name = shown(", ".join(public_part(one.source) for one in rows))
    for key, value in (
        asdict(evaluation["after"]).items() if evaluation and "after" in evaluation else ()
    ):
        if isinstance(value, int | float):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=hub_name(rows[0].source) or "local",
                dataset_name=name,
                metric_type=key,
                metric_name=MEANING[key],
                metric_value=value,
            )


def _origin(recipe: Recipe, facts: Facts | None) -> str:
    """Return what the student was made of, as a list."""
    commits = facts.revisions if facts is not None else {}

    def named(name: str, revision: str | None) -> str:
        commit = commits.get(name) or revision
        at = f" at `{shown(commit)}`" if commit else ""
        return f"`{shown(public_part(name))}`{at}"

    student = named(recipe.student.model, recipe.student.revision)
    if recipe.student.carve is not None:
        student += f", carved ({_options(recipe.student.carve)})"
    taught = ", ".join(named(*source) for source in dict.fromkeys(recipe.teacher_sources))
    if recipe.teacher.who:
        taught += f" ({shown(recipe.teacher.who)})"
    lines = {
        "Student": student,
        "Teacher": taught,
        "Rollout": _describe(recipe.rollout),
        "Objectives": "; ".join(_describe(one) for one in recipe.objectives),
        "Data": _sources(recipe.data.train),
    }
    directions = [DIRECTIONS[name] for name in _divergences(recipe)]
    if directions:
        lines["Direction of the divergence"] = "; ".join(directions)
    listed = "\n".join(f"- **{name}**: {text}" for name, text in lines.items())
    return (
        "This is a causal language model that was distilled with "
        f"[llmdistill]({HOMEPAGE}). {shown(summary(recipe))}\n\n{listed}"
    )


def _usage(recipe: Recipe) -> str:
    """Return how to load the student and let it answer."""
    is_adapter = recipe.student.peft is not None and recipe.student.peft.save == "adapter"
    package, loader = (
        ("peft", "AutoPeftModelForCausalLM")
        if is_adapter
        else ("transformers", "AutoModelForCausalLM")
    )
    load = [f"from {package} import {loader}", "from transformers import AutoTokenizer"]
    if not is_adapter:
        load = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines = [
        *load,
        "",
        'name = "."  # the folder of this card, or the name of the model on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f"model = {loader}.from_pretrained(name)",
        'messages = [{"role": "user", "content": "Name three primary colours."}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "output = model.generate(**inputs, max_new_tokens=96)",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    code = "\n".join(lines)
    return f"## How to use it\n\n```python\n{code}\n```"


def _measured(recipe: Recipe, evaluation: Mapping[str, Figures], plots: Mapping[str, str]) -> str:
    header, *rows = figures_table(evaluation)
    lines = ["| " + " | ".join([*header, "meaning"]) + " |", "|" + "---|" * (len(header) + 1)]
    lines += ["| " + " | ".join([*row, MEANING[row[0]]]) + " |" for row in rows]
    rows_from = _sources(recipe.data.eval)
    if recipe.data.hold_back:
        rows_from = f"{recipe.data.hold_back} held-out rows of {_sources(recipe.data.train)}"
    said = "".join(f"\n\n{sentence}" for sentence in remarks(evaluation))
    drawn = "".join(f"\n\n![{shown(title)}](plots/{name})" for name, title in plots.items())
    return f"## Evaluation\n\nMeasured on {rows_from}:\n\n" + "\n".join(lines) + said + drawn


def _sources(sources: Sequence[SourceRecipe]) -> str:
    return ", ".join(f"`{shown(public_part(source.source))}`" for source in sources)


def _made(recipe: Recipe, facts: Facts | None) -> str:
    text = f"## How it was made\n\nThe model was made by `llmdistill train` with {made_with()}"
    if facts is not None:
        day = datetime.datetime.fromisoformat(facts.finished).date().isoformat()
        text += f" on {day}.\n\n{_spent(facts, len(recipe.stages))}\n\nThe recipe:"
    else:
        text += ", from this recipe:"
    return f"{text}\n\n```yaml\n{fenced(public_dump(recipe))}```"


def _spent(facts: Facts, runs: int) -> str:
    """Return the rows, the tokens by writer, the time and the machine, as a list."""
    training = "Training" if runs == 1 else f"Training in the last of {runs} runs"
    who = {"teacher": "by the teacher", "student": "by the student", "data": "of the dataset"}
    tokens = ", ".join(f"{count:,} {who[name]}" for name, count in facts.tokens.items())
    processes = f" in {facts.processes} processes" if facts.processes > 1 else ""
    lines = {
        "Rows": facts.rows.get("train", "a stream"),
        "Tokens trained on": tokens or "not counted",
        training: f"{facts.steps:,} steps in {facts.seconds / 60:.1f} minutes{processes}",
        "Machine": shown(facts.machine),
    }
    if facts.memory:
        lines["Machine"] += f", at most {facts.memory / 2**30:.1f} GiB of memory"
    notes = [f"- {shown(note)}" for note in facts.notes]
    return "\n".join([*(f"- **{name}**: {text}" for name, text in lines.items()), *notes])


def _licences(parts: Sequence[Part]) -> str:
    """Return the licence of each part, and what follows for the student."""
    lines = ["| part | name | licence |", "|---|---|---|"]
    for part in parts:
        stated = "could not be read" if part.licence is None else shown(str(part.licence))
        lines.append(f"| {part.what} | {shown(part.name)} | {stated} |")
    said = "All parts have the same licence, so the card states it."
    if any(part.licence is None for part in parts):
        said = "Look up each licence that could not be read before you share this model."
    elif common(parts).name == SEVERAL:
        said = (
            "The licences differ, and each of them counts. Read them before you share this model."
        )
    return "## Licences\n\n" + "\n".join(lines) + f"\n\n{said}"


def _cited(papers: Sequence[Paper]) -> str:
    listed = "\n".join(
        f"- {paper.title} ([arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}))"
        for paper in papers
    )
    entries = "\n\n".join(paper.bibtex() for paper in papers)
    return f"## Papers\n\n{listed}\n\n```bibtex\n{entries}\n```"


def _divergences(recipe: Recipe) -> list[str]:
    """Return the divergences of the objectives that have one by name."""
    named = (getattr(one, "divergence", None) for one in recipe.objectives)
    return [name for name in dict.fromkeys(named) if name in DIRECTIONS]


def _matched(section: Any) -> str:
    """Return what an objective matches, in a few words."""
    divergence = getattr(section, "divergence", None)
    return f"{section.kind} ({divergence})" if divergence else str(section.kind)


def made_with() -> str:
    """Return the packages whose versions matter, with their versions."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


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
