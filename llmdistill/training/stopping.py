"""Saves a checkpoint and ends training if the process gets SIGTERM, as schedulers send it."""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """Remembers a SIGTERM; when all ranks know of one, saves and stops after the step.

    A second SIGTERM ends the process at once.  Signals reach ranks at different times, so the guard
    of each step tells all of them (`agreed`).
    """

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked = self.agreed = False
        # Python refuses handlers in other threads.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
