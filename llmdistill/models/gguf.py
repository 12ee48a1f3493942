"""Read the weights of a .gguf file, which are quantised."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator


def dequantize() -> object:
    """Return the option that makes GGUF weights dense.

    A student can only be trained with dense weights, and a teacher is faster with them.
    """
    from transformers import GgufConfig

    return GgufConfig(dequantize=True)


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """Hide the bar of reading GGUF tensors, for which transformers 5.23 has no switch."""
    from transformers import modeling_gguf_pytorch_utils as gguf

    shown = gguf.tqdm
    gguf.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = shown
