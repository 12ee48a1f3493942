"""Limits: of time, for chat templates, which come from a model's repository; and of memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size

from llmdistill.errors import OutOfMemoryError

RENDERING = 20.0  # seconds in which a template must have written a conversation


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer.

    It has an effect in the main thread of a process, and on systems with an alarm.  Another alarm
    that is set goes on afterwards.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not hasattr(signal, "setitimer"):
        yield
        return

    def late(_number: int, _frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, late)
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def advice_on_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Raise OutOfMemoryError with advice if the memory of a device does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise OutOfMemoryError(f"{error} {advice()}") from error
