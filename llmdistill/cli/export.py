"""`llmdistill export`: write a student in the format that another program reads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from llmdistill.cli.output import Quiet, Verbose


def export(
    source: Annotated[Path, typer.Argument(help="A run folder, or a folder with a model.")],
    output: Annotated[Path, typer.Argument(help="The new folder.")],
    format: Annotated[
        str,
        typer.Option(
            help="safetensors (adapters are merged), adapter (alone), gguf (for llama.cpp) or "
            "ollama (GGUF and a Modelfile)."
        ),
    ] = "safetensors",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the weights: bfloat16 (the default), float16, float32 or auto (that of "
            "the model's files)."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Quantise a GGUF file, such as q8_0 or q4_k_m."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an exported model in the new folder.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a student in the format that another program reads."""
    from llmdistill.cli.output import set_up

    set_up(quiet=quiet, verbose=verbose)

    from llmdistill.cli import show
    from llmdistill.publish.export import export as write

    files = write(source, output, format, dtype=dtype, quantize=quantize, overwrite=overwrite)
    if quiet:
        print(output)
        return
    show.files(output, files)
    show.next_steps(_next(output, format, next(iter(files))))


def _next(output: Path, format: str, file: str) -> dict[str, str]:
    """Return what a user can do with the files, each with its command or lines of Python."""
    folder = shlex.quote(str(output))
    if format == "gguf":
        return {"Talk to it": f"llama-cli -m {shlex.quote(str(output / file))}"}
    if format == "ollama":
        name = shlex.quote(output.resolve().name.lower())
        return {"Give it to Ollama": f"ollama create {name} -f {folder}/Modelfile"}
    kind, package = ("AutoModelForCausalLM", "transformers")
    if format == "adapter":
        kind, package = ("AutoPeftModelForCausalLM", "peft")
    load = f"from {package} import {kind}\n  model = {kind}.from_pretrained({str(output)!r})"
    return {"Load it in Python": load}
