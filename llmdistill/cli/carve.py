"""`llmdistill carve`: cut a smaller model out of a model, and save it.

B = sequences, P = prompt tokens.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdistill.cli.output import Quiet, Verbose

if TYPE_CHECKING:
    from pathlib import Path

    from llmdistill.recipe import CarveRecipe


def carve(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id or smollm2-135m-instruct.")],
    output: Annotated[str, typer.Argument(help="The folder of the new model.")],
    layers: Annotated[
        str | None,
        typer.Option(help="The number of layers to keep (20), or their indices (0,1,5)."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="How to choose layers: influence (those that change hidden states most) or even."
        ),
    ] = "influence",
    mlp_width: Annotated[int | None, typer.Option(help="Neurons to keep in each MLP.")] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads to keep in each layer.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Rows of text on which influence and activity are measured.")
    ] = "seed_tasks",
    max_rows: Annotated[
        int, typer.Option(min=1, help="How many rows of the data to use, from the first.")
    ] = 48,
    dtype: Annotated[str, typer.Option(help="Dtype of the saved weights.")] = "float32",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Cut a smaller model out of a model, from its most influential and most active parts."""
    from llmdistill import recipe as recipes

    given = {"by": by, "mlp_width": mlp_width, "heads": heads, "layers": _layers(layers)}
    section = recipes.build_part(recipes.CarveRecipe, given, "carve")

    from pathlib import Path

    from llmdistill.cli.output import set_up
    from llmdistill.cli.show import console, next_steps

    set_up(quiet=quiet, verbose=verbose)
    before, after = _carve(model, Path(output), section, data, max_rows, dtype)
    if quiet:
        print(output)
        return
    shown = f"{before:,} -> {after:,} parameters ({after / before:.0%}): {output}"
    console.print(shown, markup=False, soft_wrap=True)
    changes = f"{shlex.quote(f'student.model={output}')} student.carve=null"
    next_steps({"Train it as a student": f"llmdistill train RECIPE {changes}"})


def _layers(given: str | None) -> Any:
    """Return a number of layers, or a list of them if there is a comma."""
    from llmdistill import recipe as recipes
    from llmdistill.errors import RecipeError

    if given is None:
        return None
    if not all(part.strip() for part in given.split(",")):
        raise RecipeError(f"--layers: '{given}' has a comma without a number next to it")
    places = [recipes.parse_yaml(part, "--layers") for part in given.split(",")]
    return places if "," in given else places[0]


def _carve(
    model: str, folder: Path, section: CarveRecipe, data: str, max_rows: int, dtype: str
) -> tuple[int, int]:
    """Carve the model and save it; return the numbers of parameters before and after."""
    import itertools

    from llmdistill.data.collate import PromptDataset, sample_text
    from llmdistill.data.sources import read
    from llmdistill.data.validate import Rules
    from llmdistill.errors import CheckpointError
    from llmdistill.models.carve import Plan, carve
    from llmdistill.models.load import load_model, load_tokenizer

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty. Choose a new folder.")
    tokenizer = load_tokenizer(model)
    rules = Rules(max_prompt_tokens=512, max_response_tokens=512)
    rows = PromptDataset.encode(itertools.islice(read(data), max_rows), tokenizer, rules)
    whole = load_model(model, dtype=dtype)
    text = sample_text(rows, max_rows)
    sample = (part.to(whole.device) for part in (text.input_ids_BP, text.attention_mask_BP))
    student = carve(whole, Plan(**section.model_dump()), *sample)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return whole.num_parameters(), student.num_parameters()
