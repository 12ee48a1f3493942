"""Saves a checkpoint and ends training if the process gets SIGTERM, as schedulers send it."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from transformers import TrainerCallback

AGAIN = 10.0  # seconds


class StopOnSignal(TrainerCallback):
    """Remembers a SIGTERM; when all ranks know of one, saves and stops after the step.

    Signals reach ranks at different times, so the guard of each step tells all of them (`agreed`).
    Schedulers and launchers both send one, at nearly the same time; one that comes more than AGAIN
    seconds later ends the process.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False
        self._before: Any = None
        self._first = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked = self.agreed = False
        # Python refuses handlers in other threads.
        if self._before is None and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            # Trainer would delete all checkpoints but the best one at the end of a run.
            args.save_total_limit = None
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Let SIGTERM do what it did before training."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked and now - self._first > AGAIN:
            self.restore()
            signal.raise_signal(signal.SIGTERM)
        elif not self.asked:
            self.asked, self._first = True, now
