"""Where the CPU would wait for a GPU, counted on a machine without one.

Each tensor has a place: the GPU if it comes from a model's weights, the CPU if it comes from the
prompts or was fetched.  A result is on the GPU if one of its inputs is.  A tensor that was made of
numbers alone has no place.
"""

from __future__ import annotations

import collections
import sys
import traceback
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, CPU = "gpu", "cpu"
ASKING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero"}
TRANSFER = "llmdistill.decoding.transfer"
WITHIN = ("llmdistill", "transformers")  # packages whose lines are named
ONLY_ON_A_CPU = "llmdistill/objectives/divergences.py"  # `log_probs` asks on a CPU alone


class Waits(TorchDispatchMode):
    """Counts waits by line, and collects the operations that mix both places.

    `counts` has the waits by "file:line".  `mixed` has operations with inputs of both places, which
    fail on a GPU or copy an index to it.
    """

    def __init__(self, *models: nn.Module, on_cpu: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.mixed: list[str] = []
        self._patches = ExitStack()
        self._to, self._cpu, self._tolist = Tensor.to, Tensor.cpu, Tensor.tolist
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.place = GPU
        for tensor in on_cpu:
            tensor.place = CPU

    def of(self, package: str) -> int:
        """Return the number of waits in the files of a package."""
        lines = self.counts.items()
        return sum(n for x, n in lines if x.startswith(package) and ONLY_ON_A_CPU not in x)

    def __enter__(self) -> Waits:
        for module in ("keyed", "transfer"):
            self._patch(f"llmdistill.decoding.{module}.waits", lambda device: True)
        self._patch("llmdistill.rollouts.interleaved.waits", lambda device: True)
        self._patch("torch.Tensor.to", lambda tensor, *args, **kw: self._moved(tensor, *args, **kw))
        self._patch("torch.Tensor.cpu", lambda tensor: self._fetched(tensor))
        self._patch("torch.Tensor.tolist", lambda tensor: self._tolist(self._fetched(tensor)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        places = {_place(one) for one in inputs}
        # A number on the CPU can be added to a tensor on a GPU.
        if GPU in places and any(_place(one) == CPU and one.dim() for one in inputs):
            self.mixed.append(f"{function} at {_line()}")
        name = function.name().removeprefix("aten::").partition(".")[0]
        masks = args[1] if name.startswith("index") and len(args) > 1 else ()
        by_mask = isinstance(masks, (list, tuple)) and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in masks
        )
        if GPU in places and (name in ASKING or by_mask):
            self.counts[_line()] += 1
        result = function(*args, **kwargs)
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and (found := places & {GPU, CPU}):
                one.place = GPU if GPU in found else CPU
        return result

    def _patch(self, name: str, replacement: Any) -> None:
        self._patches.enter_context(mock.patch(name, replacement))

    def _moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self._to(tensor, *args, **kwargs)
        target = args[0] if args else kwargs.get("device")
        if _place(tensor) == CPU and isinstance(target, (torch.device, str)):
            result = result.clone() if result is tensor else result
            result.place = GPU
            # A copy that does not come from pinned memory waits for the queue.
            if sys._getframe(2).f_globals["__name__"] != TRANSFER:
                self.counts[_line()] += 1
        return result

    def _fetched(self, tensor: Tensor) -> Tensor:
        if _place(tensor) != GPU:
            return tensor
        self.counts[_line()] += 1
        result = tensor.clone()
        result.place = CPU
        return result


def _place(tensor: Tensor) -> str | None:
    return getattr(tensor, "place", None)


def _line() -> str:
    """Return the innermost line of llmdistill or transformers: "package/.../file.py:7"."""
    for frame in reversed(traceback.extract_stack()):
        for package in WITHIN:
            folder, found, rest = frame.filename.rpartition(f"/{package}/")
            if found and "/tests" not in folder:
                return f"{package}/{rest}:{frame.lineno}"
    return "tests"
