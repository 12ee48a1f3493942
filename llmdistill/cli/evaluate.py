"""`llmdistill evaluate`: measure students against teachers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdistill.cli.output import Quiet, Verbose

if TYPE_CHECKING:
    from llmdistill.cli.measured import Measured

logger = logging.getLogger("llmdistill")

Students = Annotated[
    list[str], typer.Argument(help="Folders or Hub ids of the students to measure.")
]
Teachers = Annotated[
    list[str],
    typer.Option(
        help="A folder, a Hub id, a .gguf file or smollm2-135m-instruct. Give it more than once "
        "to measure against several teachers."
    ),
]
Data = Annotated[
    str, typer.Option(help="A file or folder of rows, org/name:split on the Hub, or seed_tasks.")
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="The longest response that a model writes, in tokens.")
]
MaxRows = Annotated[
    int, typer.Option(min=1, help="How many rows of the data to use, from the first.")
]
AnswerPattern = Annotated[
    str | None,
    typer.Option(
        help="A regular expression for the result in a response, such as '#### ([0-9,.]+)'."
    ),
]
Speculative = Annotated[
    bool,
    typer.Option(
        "--speculative", help="Also measure each student as the draft model of its teacher."
    ),
]
Start = Annotated[
    str | None,
    typer.Option(help="The student before training: also measure what the students forgot."),
]
ForgetData = Annotated[
    str | None, typer.Option(help="Other rows on which forgetting is measured, as in --data.")
]
Tasks = Annotated[
    str | None,
    typer.Option(help="Also run these tasks of lm-eval, such as arc_easy,hellaswag."),
]
TaskLimit = Annotated[
    int | None, typer.Option(min=1, help="How many rows of each task to use, from the first.")
]
TaskPath = Annotated[
    str | None, typer.Option(help="A folder with more tasks for lm-eval, as YAML files.")
]
Seed = Annotated[int, typer.Option(help="Random seed of the students' samples.")]
TemplateOptions = Annotated[
    str, typer.Option(help="Options for the chat template: '{enable_thinking: false}'.")
]
Output = Annotated[str | None, typer.Option(help="Also write the figures to this JSON file.")]


@dataclass(frozen=True)
class Asked:
    """The options of one call of the command."""

    students: list[str]
    teachers: list[str]
    data: str
    max_new_tokens: int
    max_rows: int
    answer_pattern: str | None
    speculative: bool
    start: str | None
    forget_data: str | None
    tasks: list[str]
    task_limit: int | None
    task_path: str | None
    seed: int
    template_options: dict[str, Any]


def evaluate(
    students: Students,
    teacher: Teachers,
    data: Data,
    max_new_tokens: MaxNewTokens = 96,
    max_rows: MaxRows = 200,
    answer_pattern: AnswerPattern = None,
    speculative: Speculative = False,
    start: Start = None,
    forget_data: ForgetData = None,
    tasks: Tasks = None,
    task_limit: TaskLimit = None,
    task_path: TaskPath = None,
    seed: Seed = 0,
    chat_template_kwargs: TemplateOptions = "{}",
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure how close students are to a teacher, how good their responses are, and how fast they
    are.
    """
    from llmdistill.recipe import parse_yaml

    asked = Asked(
        students=students,
        teachers=teacher,
        data=data,
        max_new_tokens=max_new_tokens,
        max_rows=max_rows,
        answer_pattern=answer_pattern,
        speculative=speculative,
        start=start,
        forget_data=forget_data,
        tasks=[name.strip() for name in tasks.split(",")] if tasks else [],
        task_limit=task_limit,
        task_path=task_path,
        seed=seed,
        template_options=parse_yaml(chat_template_kwargs, "--chat-template-kwargs") or {},
    )
    _check(asked, None if output is None else Path(output))

    from llmdistill.cli.measured import measured
    from llmdistill.cli.output import set_up

    set_up(quiet=quiet, verbose=verbose)
    _show(measured(asked), asked, output, quiet=quiet)


def _check(asked: Asked, output: Path | None) -> None:
    """Raise RecipeError for what would lose figures, or end the command later; make the folder."""
    from llmdistill.errors import RecipeError
    from llmdistill.recipe.facts import wrong_pattern

    if asked.answer_pattern is not None and (wrong := wrong_pattern(asked.answer_pattern)):
        raise RecipeError(f"--answer-pattern: {wrong}")
    for option, given, needed, is_there in (
        ("--forget-data", asked.forget_data, "--start", asked.start),
        ("--task-limit", asked.task_limit, "--tasks", asked.tasks),
        ("--task-path", asked.task_path, "--tasks", asked.tasks),
    ):
        if given is not None and not is_there:
            raise RecipeError(f"{option} needs {needed}. Add it, or remove {option}.")
    _check_names(asked)
    if output is None:
        return
    if output.is_dir():
        raise RecipeError(f"--output: {output} is a folder. Name a file.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--output: cannot write {output}: {error}") from error


def _check_names(asked: Asked) -> None:
    """Raise RecipeError if two columns or two tables of figures would have the same name."""
    from llmdistill.errors import RecipeError

    taken = [*asked.students, "teacher"]
    if twice := [name for name in asked.students if taken.count(name) > 1]:
        raise RecipeError(
            f"'{twice[0]}' would name two columns of the figures. Give the student another name, "
            f"such as ./{twice[0]}."
        )
    if twice := [name for name in asked.teachers if asked.teachers.count(name) > 1]:
        raise RecipeError(f"--teacher: '{twice[0]}' is given twice. Remove one.")


def _show(results: dict[str, Measured], asked: Asked, output: str | None, *, quiet: bool) -> None:
    """Print the figures as tables, or as JSON if `quiet`; write them to a file if one is named."""
    import json

    from llmdistill.cli import show
    from llmdistill.publish.card import figures_table

    if not quiet:
        for teacher, one in results.items():
            against = f" against {teacher}" if len(results) > 1 else ""
            title = f"Figures{against} on {asked.data}: {one.counts}"
            show.table(figures_table(one.figures, one.more), title)
        show.directions(next(iter(one.figures.values())))
    records = {teacher: one.records() for teacher, one in results.items()}
    # With one teacher there is nothing to name.
    shape = {"teachers": records} if len(records) > 1 else next(iter(records.values()))
    text = json.dumps(shape, indent=2)
    if output is not None:
        Path(output).write_text(text + "\n", encoding="utf-8")
        logger.info("wrote %s", output)
    elif quiet:
        print(text)
