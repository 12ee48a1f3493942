"""What torch reports about the machine, forced in this process and in those that it starts."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "forced"
VARIABLE = "TEST_NATIVE_BFLOAT16"


def with_python_path(*folders: Path) -> str:
    """Return PYTHONPATH with `folders` before its other entries."""
    held = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), *([held] if held else [])])


def force_native_bfloat16() -> None:
    """Apply TEST_NATIVE_BFLOAT16 if it is set. Call this once."""
    if VARIABLE not in os.environ:
        return
    os.environ["PYTHONPATH"] = with_python_path(FOLDER)
    spec = importlib.util.spec_from_file_location("forced", FOLDER / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
