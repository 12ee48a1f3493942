"""`llmdistill evaluate`: measure a student against a teacher."""

from __future__ import annotations

from typing import Annotated

import typer


def evaluate(
    student: Annotated[str, typer.Argument(help="A folder or a Hub id.")],
    teacher: Annotated[
        str, typer.Option(help="A folder, a Hub id, a .gguf file or the embedded name.")
    ],
    data: Annotated[str, typer.Option(help="A .jsonl file, org/name[:split] or seed_tasks.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 96,
    max_rows: Annotated[int, typer.Option(min=1, help="The first rows of the data.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the student's samples.")] = 0,
    output: Annotated[
        str | None, typer.Option(help="Also write the figures to this JSON file.")
    ] = None,
) -> None:
    """Measure how close a student is to its teacher, how good its answers are and how fast it
    writes.
    """
    import itertools
    import json
    from dataclasses import asdict
    from pathlib import Path

    from llmdistill.cli import show
    from llmdistill.data.collate import PromptDataset, collate
    from llmdistill.data.sources import read
    from llmdistill.evaluation.measure import Evaluation
    from llmdistill.models.load import load_model, load_tokenizer
    from llmdistill.models.vocabulary import require_same
    from llmdistill.publish.card import figures_table
    from llmdistill.recipe import LocalTeacherRecipe
    from llmdistill.teachers import build_teacher

    judge = build_teacher(LocalTeacherRecipe(model=teacher))
    model, tokenizer = load_model(student), load_tokenizer(student)
    rows = [m.get_output_embeddings().weight.shape[0] for m in (judge.model, model)]
    require_same(judge.tokenizer, tokenizer, *rows)
    dataset = PromptDataset.encode(itertools.islice(read(data), max_rows), tokenizer)
    evaluation = Evaluation(judge, collate(dataset.rows), max_new_tokens=max_new_tokens, seed=seed)
    figures = {"student": evaluation.measure(model)[0], "teacher": evaluation.measure_teacher()}
    show.table(figures_table(figures), f"{student} on {data}: {dataset.counts}")
    text = json.dumps({name: asdict(value) for name, value in figures.items()}, indent=2)
    if output is None:
        print(text)
    else:
        Path(output).write_text(text + "\n", encoding="utf-8")
