"""`llmdistill carve`: cut a smaller model out of a model, and save it.

B = sequences, P = prompt tokens.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer


def carve(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id or the embedded name.")],
    output: Annotated[str, typer.Argument(help="The new model's folder.")],
    layers: Annotated[
        str | None, typer.Option(help="How many layers to keep (20), or which ones (0,1,5).")
    ] = None,
    by: Annotated[str, typer.Option(help="How to choose them: influence or even.")] = "influence",
    mlp_width: Annotated[int | None, typer.Option(help="Neurons to keep in each MLP.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads to keep a layer.")] = None,
    data: Annotated[str, typer.Option(help="Rows that show what is active.")] = "seed_tasks",
    max_rows: Annotated[int, typer.Option(min=1, help="The first rows of the data.")] = 48,
    dtype: Annotated[str, typer.Option(help="Of the saved weights.")] = "float32",
) -> None:
    """Cut layers, MLP neurons and attention heads out of a model by how active they are."""
    from llmdistill import recipe as recipes

    given: dict[str, Any] = {"by": by, "mlp_width": mlp_width, "heads": heads}
    if layers is not None:
        places = [recipes.parse_yaml(part, "--layers") for part in layers.split(",")]
        given["layers"] = places if "," in layers else places[0]
    answer = recipes.build_part(recipes.CarveRecipe, given, "carve")

    import itertools
    from pathlib import Path

    from llmdistill.cli.show import console
    from llmdistill.data.collate import PromptDataset, sample_text
    from llmdistill.data.sources import read
    from llmdistill.data.validate import Rules
    from llmdistill.errors import CheckpointError
    from llmdistill.models.carve import Plan
    from llmdistill.models.carve import carve as cut
    from llmdistill.models.load import load_model, load_tokenizer

    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty; name a new folder")
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
    console.print(f"{before:,} -> {after:,} parameters ({after / before:.0%}): {folder}")
