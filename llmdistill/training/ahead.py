"""Lets the teacher write ahead: all responses that a run will use and that never change.

P = rows of the dataset, B = rows of a batch.

Written in training, they would be written a few at a time, with as many rows as a step has.  Before
the first step they are written in batches that are large and of similar length, and every rank
writes its share.  The rows of a stream are not known before they are read: see `streams.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.decoding.batches import by_tokens
from llmdistill.protocols import Progress, Writes, WritesAhead, changes
from llmdistill.rollouts.parts import most_of_all, most_rows, room
from llmdistill.training.progress import ProgressBar
from llmdistill.training.streams import StreamTrainer


class AheadTrainer(StreamTrainer):
    """Trainer whose teacher writes ahead, if its rollout has responses that never change.

    `responses_folder` is where they are kept, and `seconds_ahead` the time that writing took before
    the first step.
    """

    responses_folder: Path
    seconds_ahead: float

    def _before_training(self) -> None:
        """Deal out the rows of a stream, and let the teacher write the responses of all steps."""
        super()._before_training()
        show = any(isinstance(one, ProgressBar) for one in self.callback_handler.callbacks)
        start = time.perf_counter()
        write_ahead(self, self.responses_folder, show_progress=show or not self.args.disable_tqdm)
        self.seconds_ahead = time.perf_counter() - start


def write_ahead(trainer: AheadTrainer, folder: Path, *, show_progress: bool) -> None:
    """Let the teacher write the responses that training will read, as far as `folder` lacks them.

    All ranks must call it together.  It does nothing for rollouts without such responses.
    """
    rows, teacher = trainer.train_dataset, trainer.teacher
    if not isinstance(trainer.rollout, WritesAhead) or changes(teacher):
        return
    trainer.rollout.keep_in(folder, teacher, trainer.args.seed)
    # Without a seeded sampler the order of the rows is not known, so each step writes its own.
    is_known = (
        isinstance(rows, PromptDataset) and trainer.args.accelerator_config.use_seedable_sampler
    )
    if not is_known or not isinstance(teacher, Writes):
        return
    missing = {one: _missing(one, rows, used) for one, used in _used(trainer, rows).items()}
    # No rank may write before all have looked, or they would share different work.
    trainer.accelerator.wait_for_everyone()
    for rollout, jobs in missing.items():
        if len(jobs):
            _write(trainer, rollout, rows, jobs, show_progress=show_progress)
        rollout.share(all_there=True)


def _used(trainer: AheadTrainer, rows: PromptDataset) -> dict[Any, dict[int, np.ndarray]]:
    """Return, for each rollout and each of its samples, which rows the run will use: (P,), bool."""
    used: dict[Any, dict[int, np.ndarray]] = {}
    assert isinstance(trainer.rollout, WritesAhead)
    for progress, places in _steps(trainer):
        planned = trainer.rollout.planned(progress)
        if planned is not None:
            samples = used.setdefault(planned.rollout, {})
            mask_P = samples.setdefault(planned.sample, np.zeros(len(rows), bool))
            mask_P[places] = True
    return used


def _steps(trainer: AheadTrainer) -> Iterator[tuple[Progress, list[int]]]:
    """Yield the progress of each step of the run, and the places of its rows on all ranks."""
    args = trainer.args
    loader = trainer.get_train_dataloader()  # a second one, which training does not use
    epochs, per_epoch, *_, num_steps = trainer.set_initial_training_values(args, loader)
    batches = loader.batch_sampler
    batches = getattr(batches, "batch_sampler", batches)  # those of all ranks, in turn
    window = args.gradient_accumulation_steps * args.world_size
    start = Progress(step=0, epoch=0, seed=args.seed, num_steps=num_steps)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        windows = _windows(batches, window)
        for number, places in enumerate(windows):
            step = epoch * per_epoch + number
            if step >= num_steps:
                return
            yield replace(start, step=step, epoch=epoch), places


def _windows(batches: Any, size: int) -> Iterator[list[int]]:
    """Yield the places in each window of this many batches."""
    places: list[int] = []
    for number, batch in enumerate(batches, start=1):
        places += batch
        if number % size == 0:
            yield places
            places = []
    if places:
        yield places


@dataclass(frozen=True)
class _Jobs:
    """Responses to write: number `sample_B` to the prompts of the rows `place_B`."""

    place_B: np.ndarray
    sample_B: np.ndarray
    length_B: np.ndarray  # tokens of each prompt

    def __len__(self) -> int:
        return len(self.place_B)


def _missing(rollout: Any, rows: PromptDataset, used: dict[int, np.ndarray]) -> _Jobs:
    """Return the responses among those used that have not been written."""
    parts = []
    for sample, mask_P in sorted(used.items()):
        for places in _blocks(np.flatnonzero(mask_P)):
            prompts = collate([rows[int(place)] for place in places])
            left = places[rollout.missing(prompts, [sample] * len(places))]
            parts.append((left, np.full(len(left), sample)))
    place_B, sample_B = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Jobs(place_B, sample_B, rows.rows.lengths("prompt_ids")[place_B])


def _blocks(places: np.ndarray, size: int = 1024) -> Iterator[np.ndarray]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _write(
    trainer: AheadTrainer,
    rollout: Any,
    rows: PromptDataset,
    jobs: _Jobs,
    *,
    show_progress: bool,
) -> None:
    """Write this rank's share of the responses, the longest prompts first."""
    args, teacher = trainer.args, trainer.teacher
    size = most_rows(rollout.batch_size, teacher)
    # Ranks see different free memory, and must make the same batches of the same work.
    rooms = [one for one in gather_object([room(teacher)]) if one is not None]
    batches = list(
        by_tokens(
            jobs.length_B.tolist(), rollout.max_new_tokens, size, tokens=min(rooms, default=None)
        )
    )[::-1]  # a lack of memory shows at once, and the last batches of the ranks end together
    own = batches[args.process_index :: args.world_size]
    own += (own or batches)[-1:] * (most_of_all(len(own), teacher) - len(own))
    bar = tqdm(
        total=sum(map(len, own)),
        desc="the teacher writes",
        unit="response",
        file=sys.stderr,
        disable=not (show_progress and args.process_index == 0) or None,  # None: on a terminal
    )
    with bar, trainer.accelerator.autocast():
        for batch in own:
            prompts = collate([rows[int(place)] for place in jobs.place_B[batch]])
            samples = jobs.sample_B[batch].tolist()
            rollout.write_missing(prompts, samples, teacher, args.seed)
            bar.update(len(batch))
