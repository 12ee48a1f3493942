"""Write a student in the format that another program reads.

The new folder appears whole or not at all: its files are written next to it and moved at the end.
The tokenizer, its chat template, the generation config and the card go along in every format.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmdistill.errors import CheckpointError, ModelError, RecipeError
from llmdistill.models.build import stored_dtype
from llmdistill.models.load import ADAPTER_WEIGHTS, DTYPES, load_model, load_tokenizer
from llmdistill.models.vocabulary import listed_ends
from llmdistill.publish.gguf import require_programs, write_gguf
from llmdistill.publish.ollama import modelfile, turns_of
from llmdistill.training.checkpoint import save_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig

IMAGE = re.compile(r"^!\[.*\]\(plots/.*\)\n\n?", flags=re.MULTILINE)  # a chart in a card

logger = logging.getLogger("llmdistill")

GENERATION, CARD, ADAPTER_CONFIG = "generation_config.json", "README.md", "adapter_config.json"
TOKENIZER = "tokenizer_config.json"  # every exported folder has this file
DEFAULT_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Export:
    """One export: from where to where, and in what form."""

    source: Path
    folder: Path
    name: str
    dtype: str | None
    quantize: str | None


def export(
    source: Path,
    out: Path,
    format: str,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write a student into the folder `out`; return the names of its main files and what they are.

    Args:
        source: A run folder, or the folder of a model or an adapter.
        out: The new folder.
        format: A name in FORMATS.
        dtype: Dtype of the weights, a name in DTYPES.  None is bfloat16; `auto` is that of the
            files of the model, or of its base model.
        quantize: A quantisation of llama.cpp for a GGUF file, such as q8_0; None for none.
        overwrite: Replace an exported model that is in `out`.

    Raises:
        RecipeError: An option is wrong, or has no meaning for the format.
        CheckpointError: `source` has no model, or `out` has files.
        ModelError: The model cannot be written in this format.
    """
    quantize = quantize.lower() if quantize is not None else None
    _check(format, dtype, quantize)
    student = student_folder(source)
    _require_free(out, student, overwrite=overwrite)
    name = source.resolve().name
    with _appears_whole(out) as folder:
        files = FORMATS[format](Export(student, folder, name, dtype, quantize))
        save_tokenizer(load_tokenizer(str(student)), folder)
        if (student / GENERATION).is_file():
            shutil.copyfile(student / GENERATION, folder / GENERATION)
        if (student / CARD).is_file():
            text = (student / CARD).read_text(encoding="utf-8")
            (folder / CARD).write_text(_card_of(text, format), encoding="utf-8")
    return files


def _card_of(text: str, format: str) -> str:
    """Return a student's card without its charts, which stay with the run.

    Of an adapter that was merged, it no longer says that PEFT loads the model.
    """
    text = IMAGE.sub("", text)
    if format == "adapter":
        return text
    for ours, theirs in (
        ("library_name: peft\n", "library_name: transformers\n"),
        (
            "from peft import AutoPeftModelForCausalLM\n",
            "from transformers import AutoModelForCausalLM\n",
        ),
        ("AutoPeftModelForCausalLM.", "AutoModelForCausalLM."),
    ):
        text = text.replace(ours, theirs)
    return text


def student_folder(given: Path) -> Path:
    """Return the folder of the model: that of the student in a run folder, or the folder itself."""
    for folder in (given / "student", given):
        if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return folder
    raise CheckpointError(
        f"{given} has no model: no student/, config.json or {ADAPTER_CONFIG}. Name the folder of a "
        "run that is finished, or of a model."
    )


def _check(format: str, dtype: str | None, quantize: str | None) -> None:
    if format not in FORMATS:
        raise RecipeError(f"format: '{format}' is not one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype: '{dtype}' is not one of {', '.join(DTYPES)}")
    if dtype is not None and format == "adapter":
        raise RecipeError("dtype: an adapter keeps its own. Remove dtype, or export safetensors.")
    if quantize is not None and format not in ("gguf", "ollama"):
        raise RecipeError(
            f"quantize: the format {format} is not quantised. Remove quantize, or export gguf."
        )


def _require_free(out: Path, student: Path, *, overwrite: bool) -> None:
    if out.is_file():
        raise CheckpointError(f"{out} is a file. Choose a folder.")
    if out.resolve() == student.resolve():
        raise CheckpointError(f"{out} is the model itself. Choose another folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    has_folders = any(one.is_dir() for one in out.iterdir())
    if has_folders or not (out / TOKENIZER).is_file():
        raise CheckpointError(
            f"{out} has files, but they are no exported model, so they are not overwritten. Choose "
            "another folder."
        )
    if not overwrite:
        raise CheckpointError(
            f"{out} is not empty. Choose another folder, or pass overwrite to replace its files."
        )


@contextmanager
def _appears_whole(out: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `out` at the end."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        made = Path(work) / "new"
        made.mkdir()  # with the usual permissions, which the temporary folder does not have
        yield made
        if out.exists():
            out.rename(Path(work) / "old")
        made.rename(out)


def _safetensors(to: Export) -> dict[str, str]:
    dtype = _save_merged(to, to.folder)
    return {"model.safetensors": f"the weights in {str(dtype).removeprefix('torch.')}"}


def _adapter(to: Export) -> dict[str, str]:
    if not (to.source / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{to.source} has no adapter: its weights are merged, or it was trained without one. "
            "Export safetensors, or train with student.peft and save: adapter."
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(to.source / name, to.folder / name)
    return {ADAPTER_WEIGHTS: "the adapter alone, which needs its base model"}


def _gguf(to: Export) -> dict[str, str]:
    require_programs(to.quantize)
    with tempfile.TemporaryDirectory(dir=to.folder.parent) as work:
        dtype = _save_merged(to, Path(work))
        save_tokenizer(load_tokenizer(str(to.source)), Path(work))
        logger.info("converting the model with llama.cpp")
        file = write_gguf(Path(work), to.folder, to.name, dtype, to.quantize)
    return {file: "the model with its tokenizer and its template, for llama.cpp"}


def _ollama(to: Export) -> dict[str, str]:
    tokenizer = load_tokenizer(str(to.source))
    turns_of(tokenizer)  # a template that cannot be written is found before the conversion
    files = _gguf(to)
    ends = sorted(listed_ends(_generation_config(to.source), tokenizer))
    text = modelfile(next(iter(files)), tokenizer, [tokenizer.decode([i]) for i in ends])
    (to.folder / "Modelfile").write_text(text, encoding="utf-8")
    return files | {"Modelfile": "the file, the template and the end tokens, for Ollama"}


FORMATS: dict[str, Callable[[Export], dict[str, str]]] = {
    "safetensors": _safetensors,
    "adapter": _adapter,
    "gguf": _gguf,
    "ollama": _ollama,
}


def _save_merged(to: Export, folder: Path) -> torch.dtype:
    """Save the model, with its adapter merged if it has one; return the dtype of the weights."""
    name = str(to.source)
    dtype = DTYPES[to.dtype or DEFAULT_DTYPE] or stored_dtype(name) or torch.float32
    is_adapter = (to.source / ADAPTER_CONFIG).is_file()
    # An adapter is added to its base model in float32, so that the sum is rounded only once.
    loaded = "float32" if is_adapter else str(dtype).removeprefix("torch.")
    logger.info("loading %s", name)
    model = load_model(name, dtype=loaded, device="cpu").to(dtype)
    model.save_pretrained(folder)
    if (to.source / GENERATION).is_file():  # an adapter's own, and not that of its base model
        shutil.copyfile(to.source / GENERATION, folder / GENERATION)
    return dtype


def _generation_config(folder: Path) -> GenerationConfig | None:
    from transformers import GenerationConfig

    file = folder / GENERATION
    if not file.is_file():
        return None
    return GenerationConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
