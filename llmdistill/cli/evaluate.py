"""`llmdistill evaluate`: measure a student against a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmdistill.data.validate import RowCounts
    from llmdistill.evaluation.measure import Figures


def evaluate(
    students: Annotated[list[str], typer.Argument(help="Folders or Hub ids, measured in turn.")],
    teacher: Annotated[
        str, typer.Option(help="A folder, a Hub id, a .gguf file or the embedded name.")
    ],
    data: Annotated[str, typer.Option(help="A .jsonl file, org/name[:split] or seed_tasks.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 96,
    max_rows: Annotated[int, typer.Option(min=1, help="The first rows of the data.")] = 200,
    answer_pattern: Annotated[
        str | None, typer.Option(help="For exact match with the references: '#### ([0-9,.]+)'.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the students' samples.")] = 0,
    output: Annotated[
        str | None, typer.Option(help="Also write the figures to this JSON file.")
    ] = None,
) -> None:
    """Measure how close students are to their teacher, how good their answers are and how fast they
    write.
    """
    from llmdistill.errors import RecipeError
    from llmdistill.recipe.facts import wrong_pattern

    if answer_pattern is not None and (wrong := wrong_pattern(answer_pattern)):
        raise RecipeError(f"--answer-pattern: {wrong}")

    import json
    from dataclasses import asdict
    from pathlib import Path

    from llmdistill.cli import show
    from llmdistill.publish.card import figures_table

    figures, counts = _measure(
        students, teacher, data, max_rows, max_new_tokens, answer_pattern, seed
    )
    show.table(figures_table(figures), f"on {data}: {counts}")
    text = json.dumps({name: asdict(value) for name, value in figures.items()}, indent=2)
    if output is None:
        print(text)
    else:
        Path(output).write_text(text + "\n", encoding="utf-8")


def _measure(
    students: list[str],
    teacher: str,
    data: str,
    max_rows: int,
    max_new_tokens: int,
    answer_pattern: str | None,
    seed: int,
) -> tuple[dict[str, Figures], RowCounts]:
    """Each model's figures by its name, and what became of the rows."""
    import itertools

    from llmdistill.data.collate import PromptDataset, collate
    from llmdistill.data.sources import read
    from llmdistill.evaluation.measure import Evaluation
    from llmdistill.models.heads import num_rows
    from llmdistill.models.load import load_config, load_model, load_tokenizer
    from llmdistill.models.vocabulary import require_same
    from llmdistill.recipe.teachers import LocalTeacherRecipe
    from llmdistill.teachers.build import load_teacher

    judge = load_teacher(LocalTeacherRecipe(model=teacher))
    teacher_rows = num_rows(judge.model)
    for name in students:  # a wrong pair is found before anything is measured
        vocab_size = load_config(name).get_text_config().vocab_size
        require_same(judge.tokenizer, load_tokenizer(name), teacher_rows, vocab_size)
    dataset = PromptDataset.encode(itertools.islice(read(data), max_rows), judge.tokenizer)
    evaluation = Evaluation(
        judge,
        collate(dataset.rows),
        max_new_tokens=max_new_tokens,
        seed=seed,
        answer_pattern=answer_pattern,
    )
    figures = {name: evaluation.measure(load_model(name)).figures for name in students}
    return figures | evaluation.teacher_figures(), dataset.counts
