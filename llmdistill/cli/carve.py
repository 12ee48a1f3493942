"""`llmdistill carve`: cut a smaller model out of a model, and save it.

B = sequences, P = prompt tokens.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmdistill.cli.output import Quiet, Verbose


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
    """Cut a smaller model out of a model: keep its most influential layers, and its most active
    MLP neurons and attention heads.
    """
    from llmdistill import recipe as recipes

    given: dict[str, Any] = {"by": by, "mlp_width": mlp_width, "heads": heads}
    if layers is not None:
        places = [recipes.parse_yaml(part, "--layers") for part in layers.split(",")]
        given["layers"] = places if "," in layers else places[0]
    answer = recipes.build_part(recipes.CarveRecipe, given, "carve")

    import itertools
    from pathlib import Path

    from llmdistill.cli import output as shown
    from llmdistill.cli.show import console, next_steps
    from llmdistill.data.collate import PromptDataset, sample_text
    from llmdistill.data.sources import read
    from llmdistill.data.validate import Rules
    from llmdistill.errors import CheckpointError
    from llmdistill.models.carve import Plan
    from llmdistill.models.carve import carve as cut
    from llmdistill.models.load import load_model, load_tokenizer

    shown.set_up(quiet=quiet, verbose=verbose)
    if not verbose:
        shown.hide_library_bars(downloads=quiet)
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty. Choose a new folder.")
    tokenizer = load_tokenizer(model)
    rules = Rules(max_prompt_tokens=512, max_response_tokens=512)
    rows = PromptDataset.encode(itertools.islice(read(data), max_rows), tokenizer, rules)
    whole = load_model(model, dtype=dtype)
    text = sample_text(rows, max_rows)
    sample = (part.to(whole.device) for part in (text.input_ids_BP, text.attention_mask_BP))
    student = cut(whole, Plan(**answer.model_dump()), *sample)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    before, after = whole.num_parameters(), student.num_parameters()
    if quiet:
        print(folder)
        return
    console.print(f"{before:,} -> {after:,} parameters ({after / before:.0%}): {folder}")
    next_steps({"Distil into it": f"llmdistill train RECIPE student.model={folder}"})
