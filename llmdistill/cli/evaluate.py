"""`llmdistill evaluate`: measure a student against a teacher."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdistill.cli.output import Quiet, Verbose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmdistill.data.collate import PromptDataset
    from llmdistill.data.validate import RowCounts
    from llmdistill.evaluation.measure import Figures

logger = logging.getLogger("llmdistill")


def evaluate(
    students: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids of the students to measure.")
    ],
    teacher: Annotated[
        str, typer.Option(help="A folder, a Hub id, a .gguf file or smollm2-135m-instruct.")
    ],
    data: Annotated[
        str,
        typer.Option(help="A file or folder of rows, org/name:split on the Hub, or seed_tasks."),
    ],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The longest response that a model writes, in tokens.")
    ] = 96,
    max_rows: Annotated[
        int, typer.Option(min=1, help="How many rows of the data to use, from the first.")
    ] = 200,
    answer_pattern: Annotated[
        str | None,
        typer.Option(
            help="A regular expression for the result in a response, such as '#### ([0-9,.]+)'."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the students' samples.")] = 0,
    chat_template_kwargs: Annotated[
        str, typer.Option(help="Options for the chat template: '{enable_thinking: false}'.")
    ] = "{}",
    output: Annotated[
        str | None, typer.Option(help="Also write the figures to this JSON file.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure how close students are to a teacher, how good their responses are, and how fast they
    are.
    """
    from llmdistill.recipe import parse_yaml

    _check(students, answer_pattern, None if output is None else Path(output))

    from llmdistill.cli.output import set_up

    set_up(quiet=quiet, verbose=verbose)
    options = parse_yaml(chat_template_kwargs, "--chat-template-kwargs") or {}
    figures, counts = _measure(
        students, teacher, data, max_rows, max_new_tokens, answer_pattern, seed, options
    )
    _show(figures, f"Figures on {data}: {counts}", output, quiet=quiet)


def _compare(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    data: str,
    options: dict[str, Any],
) -> None:
    """Warn if a student is used with another rendering than that on which it is measured."""
    import itertools

    from llmdistill.data.formats import to_examples
    from llmdistill.data.pairing import Pairing
    from llmdistill.data.sources import read
    from llmdistill.errors import DataError, VocabularyError

    pairing = Pairing(student, [teacher], options)
    try:
        for place, row in itertools.islice(read(data), 8):
            for example in to_examples(row, place):
                pairing.check(example)
    except VocabularyError as error:
        logger.warning("the student is measured on the teacher's rendering: %s", error)
    except DataError:  # a malformed row, which was reported before
        return


def _check(students: list[str], answer_pattern: str | None, output: Path | None) -> None:
    """Raise RecipeError for what would lose figures, or end the command later; make the folder."""
    from llmdistill.errors import RecipeError
    from llmdistill.recipe.facts import wrong_pattern

    if answer_pattern is not None and (wrong := wrong_pattern(answer_pattern)):
        raise RecipeError(f"--answer-pattern: {wrong}")
    taken = [*students, "teacher"]
    if twice := [name for name in students if taken.count(name) > 1]:
        raise RecipeError(
            f"'{twice[0]}' would name two columns of the figures. Give the student another name, "
            f"such as ./{twice[0]}."
        )
    if output is None:
        return
    if output.is_dir():
        raise RecipeError(f"--output: {output} is a folder. Name a file.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--output: cannot write {output}: {error}") from error


def _show(figures: dict[str, Figures], title: str, output: str | None, *, quiet: bool) -> None:
    """Print the figures as a table, or as JSON if `quiet`; write them to a file if one is named."""
    import json
    from dataclasses import asdict

    from llmdistill.cli import show
    from llmdistill.publish.card import figures_table

    if not quiet:
        show.table(figures_table(figures), title)
        show.directions(next(iter(figures.values())))
    text = json.dumps({name: asdict(value) for name, value in figures.items()}, indent=2)
    if output is not None:
        Path(output).write_text(text + "\n", encoding="utf-8")
        logger.info("wrote %s", output)
    elif quiet:
        print(text)


def _measure(
    students: list[str],
    teacher: str,
    data: str,
    max_rows: int,
    max_new_tokens: int,
    answer_pattern: str | None,
    seed: int,
    options: dict[str, Any],
) -> tuple[dict[str, Figures], RowCounts]:
    """Return the figures of each model by its name, and the counts of rows used and dropped."""
    from llmdistill.data.collate import collate
    from llmdistill.evaluation.measure import Evaluation
    from llmdistill.models.heads import num_rows
    from llmdistill.models.load import load_config, load_model, load_tokenizer
    from llmdistill.models.vocabulary import require_same
    from llmdistill.teachers.local import LocalTeacher

    logger.info("loading the teacher %s", teacher)
    judge = LocalTeacher.load(teacher)
    teacher_rows = num_rows(judge.model)
    for name in students:  # refuse a wrong pair before the first model is measured
        vocab_size = load_config(name).get_text_config().vocab_size
        require_same(judge.tokenizer, load_tokenizer(name), teacher_rows, vocab_size)
    configs = [load_config(name).get_text_config() for name in (teacher, *students)]
    dataset = _rows(judge.tokenizer, configs, data, max_rows, max_new_tokens, options)
    for name in students:
        _compare(load_tokenizer(name), judge.tokenizer, data, options)
    logger.info("the teacher answers %d prompts", len(dataset))
    evaluation = Evaluation(
        judge,
        collate(dataset.rows),
        max_new_tokens=max_new_tokens,
        seed=seed,
        answer_pattern=answer_pattern,
    )
    figures = {}
    for name in students:
        logger.info("measuring %s", name)
        figures[name] = evaluation.measure(load_model(name)).figures
    return figures | evaluation.teacher_figures(), dataset.counts


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    configs: list[Any],
    data: str,
    max_rows: int,
    max_new_tokens: int,
    options: dict[str, Any],
) -> PromptDataset:
    """Return the encoded rows; prompts that leave no room for an answer are dropped and counted."""
    import itertools
    import math

    from llmdistill.data.collate import PromptDataset
    from llmdistill.data.context import room
    from llmdistill.data.sources import read
    from llmdistill.data.validate import Rules

    fits = min(room(config, max_new_tokens) for config in configs)
    limit = None if fits == math.inf else int(fits)
    rules = Rules(max_prompt_tokens=limit, template_options=options)
    dataset = PromptDataset.encode(itertools.islice(read(data), max_rows), tokenizer, rules)
    for note in dataset.counts.notes():
        logger.warning("data: %s", note)
    return dataset
