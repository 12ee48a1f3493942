"""Streams in training: the rows of each rank, the position of a run, and reading ahead.

Trainer counts steps and not passes over a stream, so it does not know the position of a run.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmdistill.batch import Prompts
from llmdistill.data.collate import PromptStream
from llmdistill.errors import CheckpointError
from llmdistill.protocols import Progress, Teacher, WritesAhead, changes
from llmdistill.rollouts.parts import most_rows
from llmdistill.training.groups import GroupedTrainer

PLACE = "stream.json"  # of a checkpoint: the pass over the stream, and the rows of it that are done
STREAM_BATCHES = 4  # a stream is read ahead by this many batches of the largest size


class StreamTrainer(GroupedTrainer):
    """Trainer that knows its position in a stream."""

    teacher: Teacher
    _stream_ahead: StreamAhead | None = None
    _pass: Any = None  # the iterator of the pass that is read
    _number = -1  # of the pass
    _done = 0  # batches of the pass that this rank has taken
    _resumed = 0  # those of them that were taken before a resume
    _ended = False  # whether the pass is over

    def _before_training(self) -> None:
        """Deal out the rows of a stream."""
        if isinstance(self.train_dataset, PromptStream):
            args = self.args
            self.train_dataset.deal_out(
                args.process_index, args.world_size, args.train_batch_size,
                drop_last=args.dataloader_drop_last,
            )  # fmt: skip

    def _next_batches(
        self, batches: Iterator[Prompts], number: int, progress: Progress
    ) -> tuple[list[Prompts], Progress]:
        """Return the next batches, and the progress with the number of the pass over a stream.

        The teacher may write the responses of a stream ahead.
        """
        if not isinstance(self.train_dataset, PromptStream):
            return list(itertools.islice(batches, number)), progress
        if batches is not self._pass:
            self._pass, self._ended = batches, False
            self._number, self._done, self._resumed = self._number + 1, self._resumed, 0
        progress = replace(progress, epoch=self._number)
        if self._ended:
            return [], progress
        if isinstance(self.rollout, WritesAhead) and not changes(self.teacher):
            self._stream_ahead = self._stream_ahead or StreamAhead()
            found = self._stream_ahead.next(self, batches, number, progress)
        else:
            found = list(itertools.islice(batches, number))
        # Trainer would take no step after a window with fewer batches.
        self._ended = not self._all_have(len(found) == number)
        self._done += 0 if self._ended else len(found)
        return [] if self._ended else found, progress

    def _all_have(self, has_one: bool) -> bool:
        """Whether all ranks have a window.  They drop different rows, so one may end earlier."""
        if self.args.world_size == 1:
            return has_one
        have = torch.tensor(int(has_one), device=self.args.device)
        return int(self.accelerator.reduce(have, reduction="sum")) == self.args.world_size

    # ---- checkpoints ----

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the position in a stream, too."""
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, PromptStream) and self.args.should_save:
            rows = self._done * self.args.train_batch_size * self.args.world_size
            place = json.dumps({"pass": self._number, "rows": rows})
            (Path(output_dir) / PLACE).write_text(place, encoding="utf-8")

    def _init_training_state(
        self, max_steps: Any, per_epoch: Any, epochs: Any, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Return the pass to continue, and the batches of it that are done.

        Trainer takes the whole run for one pass over a stream.
        """
        trained = super()._init_training_state(max_steps, per_epoch, epochs, checkpoint, trial)
        if checkpoint is None or not isinstance(self.train_dataset, PromptStream):
            return trained
        place = json.loads((Path(checkpoint) / PLACE).read_text(encoding="utf-8"))
        size = self.args.train_batch_size * self.args.world_size
        if place["rows"] % size:
            raise CheckpointError(
                f"{checkpoint} stands at row {place['rows']} of a stream, which is no whole number "
                f"of batches of {size} rows. Set training.per_device_train_batch_size as before."
            )
        self._number, self._resumed = place["pass"] - 1, place["rows"] // size
        return place["pass"], self._resumed


class StreamAhead:
    """Reads a stream some steps ahead, and lets the teacher write their responses together."""

    def __init__(self) -> None:
        self._windows: deque[list[Prompts]] = deque()
        self._source: Any = None

    def next(
        self, trainer: StreamTrainer, batches: Iterator[Prompts], number: int, progress: Progress
    ) -> list[Prompts]:
        """Return the next `number` batches, whose responses have been written."""
        if self._source is not batches:  # another pass over the stream
            self._windows.clear()
            self._source = batches
        if not self._windows:
            self._read(trainer, batches, number, progress)
        return self._windows.popleft() if self._windows else []

    def _read(
        self, trainer: StreamTrainer, batches: Iterator[Prompts], number: int, progress: Progress
    ) -> None:
        teacher, rollout = trainer.teacher, trainer.rollout
        assert isinstance(rollout, WritesAhead)
        rows = STREAM_BATCHES * most_rows("auto", teacher)
        together: dict[Any, list[tuple[Prompts, int]]] = {}
        for step in range(progress.step, progress.num_steps):
            window = _take(batches, number)
            if not window:
                break
            self._windows.append(window)
            planned = rollout.planned(replace(progress, step=step))
            if planned is not None:
                prompts = Prompts.join(window, pad_id=0)
                together.setdefault(planned.rollout, []).append((prompts, planned.sample))
            if sum(len(part) for one in self._windows for part in one) >= rows:
                break
        for one, parts in together.items():
            prompts = Prompts.join([part for part, _ in parts], pad_id=0)
            samples = [sample for part, sample in parts for _ in range(len(part))]
            one.write_missing(prompts, samples, teacher, trainer.args.seed)


def _take(batches: Iterator[Prompts], number: int) -> list[Prompts]:
    found: Sequence[Prompts | None] = [next(batches, None) for _ in range(number)]
    return [one for one in found if one is not None]
