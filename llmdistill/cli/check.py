"""`llmdistill check`: look at everything a run would use, and train nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmdistill.data.collate import EncodedRows
    from llmdistill.data.validate import Row
    from llmdistill.recipe import Recipe


def check(
    recipe: Annotated[str, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: data.train=x.jsonl")
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Also make two steps, forget them, and tell how long.")
    ] = False,
) -> None:
    """Validate a recipe, count its data, compare the tokenizers, show one rendered example and
    estimate memory and time.
    """
    from llmdistill import recipe as recipes

    loaded = recipes.load(recipe, overrides or [])

    from llmdistill.cli.show import console
    from llmdistill.data.collate import PromptDataset
    from llmdistill.run import load_data

    console.print(f"recipe       {recipe} is valid; the run folder would be {loaded.output}")
    tokenizer, fits = _pair(loaded)
    train, held = load_data(loaded, tokenizer)
    known = (
        f"{len(train)} rows ({train.counts})" if isinstance(train, PromptDataset) else "a stream"
    )
    console.print(f"data         train {known}", highlight=False)
    if held is not None:
        console.print(f"             evaluate {len(held)} rows ({held.counts})", highlight=False)
    console.print("example      trained tokens are marked:\n")
    console.print(_marked(train.head(1)[0], tokenizer, written=not loaded.rollout.takes_data))
    _memory(loaded, train)
    if not fits:
        raise typer.Exit(2)
    if time:
        _time(loaded, train)


def _pair(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, bool]:
    """Shows whether teacher and student speak alike: the student's tokenizer, and the found."""
    from llmdistill.cli.show import console
    from llmdistill.data.render import same_template
    from llmdistill.models.load import load_config, load_tokenizer
    from llmdistill.models.vocabulary import VocabularyMatch, compare

    sides = (recipe.teacher_source, (recipe.student.model, recipe.student.revision))
    teacher, student = (load_tokenizer(name, revision=revision) for name, revision in sides)
    configs = [load_config(name, revision=revision).get_text_config() for name, revision in sides]
    found = compare(teacher, student, *(config.vocab_size for config in configs))
    reason = found.reason or f"{found.shared} shared ids"
    console.print(f"vocabulary   {found.match.value}: {reason}")
    alike = same_template(teacher, student)
    console.print(
        f"template     {'both sides render' if alike else 'the sides do not render'} alike"
    )
    return student, alike and found.match is not VocabularyMatch.DIFFERENT


def _memory(recipe: Recipe, train: EncodedRows) -> None:
    from llmdistill.cli import show
    from llmdistill.cost import memory

    parts = memory(recipe, train)
    sizes = [*parts.items(), ("all", sum(parts.values()))]
    rows = [[name, f"{size / 2**30:.2f}"] for name, size in sizes if size]
    show.console.print()
    show.table([["", "GiB"], *rows], "memory on one device, estimated for the longest rows")


def _time(recipe: Recipe, train: EncodedRows) -> None:
    from llmdistill.cli.show import console
    from llmdistill.cost import num_steps, seconds_per_step

    steps, all_seconds = num_steps(recipe, train), 0.0
    for writer, (seconds, share) in seconds_per_step(recipe).items():
        console.print(f"time         {seconds:.1f} s a step here when {writer} writes")
        all_seconds += seconds * (1.0 if share is None else share)
    hours = steps * all_seconds / 3600
    console.print(f"             {steps} steps: at most {hours:.1f} hours, and the evaluations")


def _marked(row: Row, tokenizer: PreTrainedTokenizerBase, *, written: bool) -> object:
    """The row as the student reads it, the tokens that are trained in reverse video and
    brackets.
    """
    from rich.text import Text

    text = Text(tokenizer.decode(row.prompt_ids), style="dim")
    if written or row.response_ids is None:
        return text.append("[written during the run]", style="reverse")
    return text.append(f"[{tokenizer.decode(row.response_ids)}]", style="reverse")
