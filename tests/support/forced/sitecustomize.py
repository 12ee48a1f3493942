"""Force what torch reports about this CPU: TEST_NATIVE_BFLOAT16=1 (native bfloat16), or 0.

Python imports this module at its start if this folder is on PYTHONPATH. It therefore imports
nothing heavy itself, and waits until `torch.cpu` is imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VARIABLE = "TEST_NATIVE_BFLOAT16"


def set_answer(cpu: ModuleType, native: bool) -> None:
    cpu._is_avx512_bf16_supported = cpu._is_amx_tile_supported = lambda: native


class AfterImport:
    """A finder that lets others import `torch.cpu`, and then sets its answer."""

    def __init__(self, native: bool) -> None:
        self.native = native

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_set(module: ModuleType) -> None:
            run(module)
            set_answer(module, self.native)

        spec.loader.exec_module = run_and_set
        return spec


def force(answer: str) -> None:
    if answer not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: got {answer!r}; give 0 or 1")
    native = answer == "1"
    if "torch.cpu" in sys.modules:
        set_answer(sys.modules["torch.cpu"], native)
    else:
        sys.meta_path.insert(0, AfterImport(native))


if VARIABLE in os.environ:
    force(os.environ[VARIABLE])
