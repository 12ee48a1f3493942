"""Write GGUF files with llama.cpp's own programs.

The programs know hundreds of architectures and tokenizers, and change with them.  They are looked
for in the folder that the environment variable LLAMA_CPP names (a clone of llama.cpp), and on PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llmdistill.errors import ModelError

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
WRITTEN_BY_CONVERTER = ("q8_0", "tq1_0", "tq2_0")  # the quantisations that need no second program
SHOWN_LINES = 5  # of what a program said before it failed


def require_programs(quantize: str | None) -> None:
    """Raise ModelError if a program is missing that the conversion will need."""
    _converter()
    if _needs_quantizer(quantize):
        _quantizer()


def write_gguf(
    model: Path, folder: Path, name: str, dtype: torch.dtype, quantize: str | None
) -> str:
    """Convert a saved model into a GGUF file in `folder`; return the file's name.

    Raises ModelError if a program is missing or fails.
    """
    kind = TYPES[dtype] if quantize is None or _needs_quantizer(quantize) else quantize
    file = folder / f"{name}-{kind.upper()}.gguf"
    options = ["--outfile", str(file), "--outtype", kind]
    _run([sys.executable, str(_converter()), str(model), *options])
    if quantize is None or not _needs_quantizer(quantize):
        return file.name
    small = folder / f"{name}-{quantize.upper()}.gguf"
    _run([str(_quantizer()), str(file), str(small), quantize.upper()])
    file.unlink()
    return small.name


def _needs_quantizer(quantize: str | None) -> bool:
    return quantize is not None and quantize not in WRITTEN_BY_CONVERTER


def _converter() -> Path:
    if found := _found(CONVERTER, [CONVERTER]):
        return found
    raise ModelError(
        f"writing GGUF needs llama.cpp's {CONVERTER}, which is neither {_places()}. Run these "
        "commands, and then this one again:\n"
        "  git clone https://github.com/ggml-org/llama.cpp\n"
        "  pip install gguf sentencepiece\n"
        '  export LLAMA_CPP="$PWD/llama.cpp"'
    )


def _quantizer() -> Path:
    if found := _found(QUANTIZER, [f"build/bin/{QUANTIZER}", QUANTIZER]):
        return found
    raise ModelError(
        f"this quantisation needs llama.cpp's {QUANTIZER}, which is neither {_places()}. Use q8_0, "
        "or build it in the clone of llama.cpp, and run this command again:\n"
        "  cmake -B build\n"
        f"  cmake --build build -t {QUANTIZER}"
    )


def _found(program: str, within: Sequence[str]) -> Path | None:
    folder = os.environ.get("LLAMA_CPP")
    if folder:
        places = (Path(folder).expanduser() / name for name in within)
        return next((place for place in places if place.is_file()), None)
    on_path = shutil.which(program)
    return None if on_path is None else Path(on_path)


def _places() -> str:
    folder = os.environ.get("LLAMA_CPP")
    return (
        f"in LLAMA_CPP={folder} nor in its build folder" if folder else "on PATH nor in LLAMA_CPP"
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-SHOWN_LINES:]
        said = "\n  ".join(last) or f"exit status {done.returncode}"
        raise ModelError(f"{Path(command[0]).name} failed ({' '.join(command)}):\n  {said}")
