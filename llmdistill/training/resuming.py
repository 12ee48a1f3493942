"""A Trainer that resumes only from a whole checkpoint of the same run.

`seal.py` defines what makes a checkpoint whole.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from llmdistill.data.collate import PromptDataset, PromptStream, fingerprint
from llmdistill.errors import CheckpointError, StoppedError
from llmdistill.protocols import Stateful, changes
from llmdistill.rollouts.kept import identity
from llmdistill.training import seal
from llmdistill.training.pushing import PushingTrainer
from llmdistill.training.seal import Sealed
from llmdistill.training.stopping import StopOnSignal

T = TypeVar("T")
logger = logging.getLogger("llmdistill")


class ResumingTrainer(PushingTrainer):
    """PushingTrainer that seals its checkpoints, and resumes only from a sealed one of this run."""

    _depends_on: dict[str, Any] | None = None
    _found: Path | None = None  # what `find_checkpoint` has found
    _saved_step: int | None = None  # the step of the last checkpoint of this process

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_on_signal = StopOnSignal()
        self.add_callback(self.stop_on_signal)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or only load the student if the run that is resumed is finished.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest one that is whole.  If a
                run was stopped before it had one, True starts it again.
            kwargs: See Trainer.

        Raises:
            CheckpointError: The checkpoint, or each one of several, is damaged; it belongs to a run
                with other rows, models or batches.
            StoppedError: The process got SIGTERM.  A checkpoint of the last step was saved.
        """
        folder = self.find_checkpoint(resume_from_checkpoint)
        if folder is not None and self._is_finished(folder):
            return self._load_finished(folder)
        self._before_training()
        limit = self.args.save_total_limit
        try:
            start = None if folder is None else str(folder)
            output = super().train(resume_from_checkpoint=start, **kwargs)
            self._raise_if_stopped()
        finally:
            self.stop_on_signal.restore()
            self.args.save_total_limit = limit  # `StopOnSignal` lifts it
        return output

    def find_checkpoint(self, asked: str | Path | bool | None) -> Path | None:
        """Return the checkpoint to resume from, whole and of this run; None if there is none.

        `asked` and errors are those of `train`.  All ranks call it, before the first step.
        """
        # Before a checkpoint is loaded: the weights of a student and its teacher are the first.
        self._depends_on = self._depends_on or depends_on(self)
        if not asked:
            return None
        if self._found is None or self._found != Path(str(asked)):
            self._found = on_first_rank(lambda: _checkpoint_of(self, asked))
        return self._found

    def _before_training(self) -> None:
        """Do what must be done before the first step.  All ranks call it."""

    def _raise_if_stopped(self) -> None:
        if self.stop_on_signal.agreed and self.state.global_step < self.state.max_steps:
            raise StoppedError(
                f"SIGTERM ended the run after step {self.state.global_step}. Its checkpoint is in "
                f"{self.args.output_dir}. Resume it to go on."
            )

    # ---- a run that is over ----

    def _load_finished(self, folder: Path) -> TrainOutput:
        """Load the student of a finished run; with `load_best_model_at_end`, the best one.

        Trainer checks whether a run is over only after a step, so it would train one step more.
        """
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(_state_file(folder))
        logger.warning(
            "the run is already finished at step %d, so nothing was trained", self.state.global_step
        )
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        return TrainOutput(self.state.global_step, 0.0, {})

    def _is_finished(self, folder: Path) -> bool:
        """Whether the checkpoint's run has made all its steps or stopped early.

        A run that a signal or another callback stopped is not finished.
        """
        state = TrainerState.load_from_json(_state_file(folder))
        # The steps are counted again, because the resumed run may have been given more of them.
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state.global_step >= max_steps or self._has_lost_patience(state)

    def _has_lost_patience(self, state: TrainerState) -> bool:
        """Whether early stopping had ended the run, and the patience is still exhausted."""
        saved = state.stateful_callbacks.get("EarlyStoppingCallback", {})
        counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        return any(
            counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )

    # ---- saving ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save the last step before a stop, which `save_strategy: best` would not do."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stop_on_signal.agreed:
            self._save_checkpoint(self.model_wrapped, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, seal it, push its student, and only then delete older checkpoints.

        Raises CheckpointError if it cannot be written; what was written of it is deleted.
        """
        step = self.state.global_step
        if step == self._saved_step:  # at the end of an epoch, too
            return
        parent = Path(self._get_output_dir(trial=trial))
        folder = parent / f"checkpoint-{step}"
        on_first_rank(lambda: shutil.rmtree(folder, ignore_errors=True))  # of a killed start
        try:
            with _left_to_us(self.args):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save and not self.args.save_only_model:
                about = Sealed(step, self.args.world_size, self._depends_on or {})
                seal.seal(folder, about)
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise _cannot_save(folder, error) from error
        self._saved_step = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            keep = [folder, *map(Path, filter(None, [self.state.best_model_checkpoint]))]
            seal.keep_newest(parent, self.args.save_total_limit, keep)


def depends_on(trainer: ResumingTrainer) -> dict[str, Any]:
    """Return what the next steps of a run depend on and what no checkpoint contains."""
    args, rows = trainer.args, trainer.train_dataset
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    known: dict[str, Any] = {"rows in a step": size, "seed": args.seed}
    # Trainer would use the rate of the checkpoint and ignore another one.
    known["learning rate"] = args.learning_rate
    if isinstance(rows, PromptDataset | PromptStream):
        known["the rows"] = fingerprint(rows)
    teacher, student = trainer.model.teacher, trainer.model.student
    # A checkpoint contains what is trained of a teacher and of the student.
    if not changes(teacher) and getattr(teacher, "model", None) is not student:
        known["the teacher"] = identity(teacher)
    for name, model in (("student", student), ("teacher", trainer.model.trained_teacher)):
        if model is not None and (frozen := [p for p in model.parameters() if not p.requires_grad]):
            known[f"the frozen weights of the {name}"] = identity(frozen)
    return known


def on_first_rank(work: Callable[[], T]) -> T:
    """Let the first rank do some work; return its result, or raise its error, on all ranks."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except CheckpointError as error:
            outcome[1] = str(error)
        except Exception as error:
            outcome[1] = f"{type(error).__name__}: {error}"
    broadcast_object_list(outcome)
    result, message = outcome
    if message is not None:
        raise CheckpointError(message)
    return result


def _checkpoint_of(trainer: ResumingTrainer, asked: str | Path | bool) -> Path | None:
    """Return the whole checkpoint to resume from, or None if there is nothing to resume."""
    checkpoints = Path(trainer.args.output_dir)
    if asked is not True:
        folder = Path(str(asked))
        sealed = seal.require_sealed(folder)
        _require_same_run(trainer, folder, sealed)
        _set_aside(checkpoints, folder, sealed.step)
        return folder
    found = seal.newest(checkpoints)
    for reason in found.skipped:
        logger.warning("a checkpoint was skipped: %s", reason)
    if found.folder is None or found.sealed is None:
        logger.warning("%s has no whole checkpoint, so the run starts again", checkpoints)
        return None
    logger.info("resuming from %s", found.folder)
    _require_same_run(trainer, found.folder, found.sealed)
    return found.folder


def _set_aside(checkpoints: Path, folder: Path, step: int) -> None:
    """Rename the checkpoints after the one that is asked for, or a later resume would take them."""
    if folder.resolve().parent != checkpoints.resolve():
        return
    for later in seal.numbered(checkpoints):
        if int(later.name.removeprefix("checkpoint-")) > step:
            aside = later.with_name(f"{later.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
            logger.warning("%s is kept as %s, and no resume will use it", later, aside.name)


def _require_same_run(trainer: ResumingTrainer, folder: Path, sealed: Sealed) -> None:
    now, world = trainer._depends_on or {}, trainer.args.world_size
    if isinstance(trainer.rollout, Stateful) and world != sealed.world_size:
        raise CheckpointError(
            f"{folder} was saved by {sealed.world_size} processes, and there are {world} now. Each "
            "one keeps the responses that it wrote (rollout.kind: replay), so use as many."
        )
    names = seal.differences(sealed.depends_on, now)
    if names:
        told = [
            f"{name} ({sealed.depends_on.get(name)} then, {now.get(name)} now)" for name in names
        ]
        raise CheckpointError(
            f"{folder} belongs to a run that differs from this one in {', '.join(told)}. Restore "
            "it, with as many rows in a step if the number of processes has changed, or start "
            "another run."
        )


@contextlib.contextmanager
def _left_to_us(args: TrainingArguments) -> Iterator[None]:
    """Keep Trainer from pushing or deleting checkpoints before the new one is sealed."""
    before = args.save_total_limit, args.push_to_hub
    args.save_total_limit, args.push_to_hub = None, False
    try:
        yield
    finally:
        args.save_total_limit, args.push_to_hub = before


def _cannot_save(folder: Path, error: Exception) -> CheckpointError:
    free = shutil.disk_usage(folder.parent).free / 1e9
    return CheckpointError(
        f"cannot write the checkpoint {folder}: {error}. {free:.1f} GB are free there now. The "
        "checkpoints before it are whole. If the disk is full, free some space or set "
        "training.save_total_limit; then resume."
    )


def _state_file(folder: str | Path) -> str:
    return str(Path(folder) / TRAINER_STATE_NAME)
