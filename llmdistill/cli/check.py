"""`llmdistill check`: look at everything a run would use, and train nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmdistill.data.validate import Row


def check(
    recipe: Annotated[str, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: data.train=x.jsonl")
    ] = None,
) -> None:
    """Validate a recipe, count its data, compare the tokenizers and show one rendered example."""
    from llmdistill import recipe as recipes

    loaded = recipes.load(recipe, overrides or [])

    from llmdistill.cli.show import console
    from llmdistill.data.collate import PromptDataset
    from llmdistill.data.render import same_template
    from llmdistill.models.load import load_config, load_tokenizer
    from llmdistill.models.vocabulary import Agreement, compare
    from llmdistill.run import load_data

    console.print(f"recipe       {recipe} is valid; the run folder would be {loaded.output}")
    sides = (loaded.teacher, loaded.student)
    teacher, student = (load_tokenizer(side.model, revision=side.revision) for side in sides)
    configs = [load_config(side.model, revision=side.revision).get_text_config() for side in sides]
    verdict = compare(teacher, student, *(config.vocab_size for config in configs))
    console.print(
        f"vocabulary   {verdict.agreement.value}: "
        f"{verdict.reason or f'{verdict.shared} shared ids'}"
    )
    template = same_template(teacher, student)
    console.print(
        f"template     {'both sides render alike' if template else 'the sides render differently'}"
    )
    train, held = load_data(loaded, student)
    first = train.head(1)[0]
    known = (
        f"{len(train)} rows ({train.counts})" if isinstance(train, PromptDataset) else "a stream"
    )
    console.print(f"data         train {known}", highlight=False)
    if held is not None:
        console.print(f"             evaluate {len(held)} rows ({held.counts})", highlight=False)
    console.print("example      trained tokens are marked:\n")
    console.print(_marked(first, student))
    if verdict.agreement is Agreement.DIFFERENT or not template:
        raise typer.Exit(2)


def _marked(row: Row, tokenizer: PreTrainedTokenizerBase) -> object:
    """The row as the student reads it, the tokens that are trained in reverse video and
    brackets.
    """
    from rich.text import Text

    text = Text(tokenizer.decode(row.prompt_ids), style="dim")
    if row.response_ids is None:
        return text.append("[written during the run]", style="reverse")
    return text.append(f"[{tokenizer.decode(row.response_ids)}]", style="reverse")
