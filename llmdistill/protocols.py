"""The interfaces of rollouts, teachers and the student.

B = rows, T = tokens, N = predicted tokens.  A class that has the methods of a protocol implements
it; it does not have to inherit.  On several ranks, every rank calls each method with its own rows.
No implementation may draw from a global random generator: all randomness must follow from a `Draw`,
or from the seed and step of `Progress`.  A row is then written the same on any number of ranks and
after a resume.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Module

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.models.taps import Need as Need
from llmdistill.sampling import Draw, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Progress:
    """The state of training when a batch is written."""

    step: int
    """Optimiser steps that are done, from 0."""
    epoch: int
    """Complete passes over the data, from 0."""
    seed: int
    """The seed of the run."""
    num_steps: int = 0
    """Optimiser steps of the whole run."""
    eval_losses: tuple[float, ...] = ()
    """Held-out losses so far, the oldest first."""


@runtime_checkable
class Writes(Protocol):
    """A model that can write responses: the student, or a teacher with this method."""

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """Write one response to each prompt.

        The model must run in eval mode and without gradients, and be left as it was.

        Args:
            prompts: The prompts of B rows.
            sampling: How tokens are drawn.
            max_new_tokens: The longest response, in tokens, its end token included.
            draw: The source of all randomness, together with the row ids.  A response must not
                depend on the other rows of its batch.

        Returns:
            Prompts and responses in the prompts' order, on the CPU, padded on the right.  A
            response that has ended contains its end token.
        """


@runtime_checkable
class Steps(Protocol):
    """A model that can read and write a few tokens at a time, for interleaved rollouts."""

    def session(self, prompts: Prompts) -> AbstractContextManager[Any]:
        """Return a context manager that gives a `decoding.session.Session` over these prompts.

        A session is a cache that can be extended, and from which each row can remove its last
        tokens.
        """


class Student(Writes, Steps, Protocol):
    """The student as a rollout sees it: `Distillation`, the module that the trainer wraps."""


class Teacher(Protocol):
    """The model that scores the tokens that the student learns on.

    Some teachers have more than these members.

    - `config`: the transformers configuration of the model that its inner states come from.
    - `write` (`Writes`) and `ends`, the ids that end a response, if it can write.
    - `session` (`Steps`), if it can take part in interleaved rollouts.
    - `scores_anew`, which is True if its signal is not what it read while it wrote.
    - `reads_changes`, which is True if it applies `embedding_change` of the sequences.
    - `plain`, the teacher to measure a student against, if it is another one.
    - `after_step`, `state_dict` and `load_state_dict`, if it changes with the student (`Follows`).
    - `train_sampler`, if it chooses the order of the rows (`Orders`).
    - `export`, if something of it is kept when training ends (`Exports`).
    - `exported`, a context in which the student has the weights to export, if not its own.

    A teacher with parameters that are trained is a `teachers.base.TrainableTeacher`.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, which must have the student's vocabulary."""

    @property
    def provides(self) -> frozenset[Need]:
        """What `judge` can return: `Need.DISTRIBUTION`, `Need.HIDDEN` and so on."""

    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the N predicted tokens of the sequences, row by row, with a forward pass.

        The signal must contain everything that `needs` asks for.  It stays on the teacher's device;
        `sequences` may be on any device.  The method is called once for each micro-batch, unless
        the sequences already have a signal that covers the needs, and once more for each objective
        on inputs that the teacher reads changed.
        """


@runtime_checkable
class Follows(Protocol):
    """A frozen teacher whose weights change with the student's, such as their moving average."""

    def after_step(self) -> None:
        """Follow the student.  The method is called after each optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights that a resumed run needs; they are saved in checkpoints."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


@runtime_checkable
class Orders(Protocol):
    """A teacher that chooses the order of the training rows."""

    def train_sampler(self, rows: Any, *, epochs: float, seed: int) -> Any:
        """Return a sampler of the indices of `rows` for one epoch after another.

        `epochs` is the number of passes over the data of the whole run.
        """


@runtime_checkable
class Exports(Protocol):
    """A teacher of which something is kept when training ends."""

    def export(self, folder: Path) -> None:
        """Write it into the run folder.  The method is called on the first rank."""


class Rollout(Protocol):
    """The part of a run that writes the responses that the student learns on."""

    def write(
        self, prompts: Prompts, student: Student, teacher: Any, progress: Progress
    ) -> Sequences:
        """Write one response to each prompt.

        Args:
            prompts: The prompts of a whole gradient accumulation window.
            student: The student, which can write and can open a session.
            teacher: The teacher of the run, a `Teacher`.  A rollout that needs it to write should
                raise RecipeError if it cannot.
            progress: The state of training.

        Returns:
            The prompts with one response each, in their order.  No row may be added, dropped or
            moved, because the trainer recognises filler rows by their index.
        """


@runtime_checkable
class WritesAhead(Protocol):
    """A rollout, some responses of which never change, so that they can be written ahead."""

    def planned(self, progress: Progress) -> Planned | None:
        """Return the responses that a step will use and that never change, or None."""

    def keep_in(self, folder: Path, teacher: Any, seed: int) -> None:
        """Keep such responses in a folder from now on, and read those that are in it."""


class Planned(NamedTuple):
    """The responses that a step will use: those of number `sample` to the prompts of the step.

    `rollout` is a `rollouts.sampled.SampledRollout`, which writes and keeps them.
    """

    rollout: Any
    sample: int


@runtime_checkable
class Stateful(Protocol):
    """A rollout with state that belongs in a checkpoint; each rank saves and loads its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return all the state that the next `write` depends on, as JSON-serialisable values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


def scores_anew(teacher: Teacher) -> bool:
    """Whether the signal of this teacher differs from what it read while it wrote.

    Such a teacher has an attribute `scores_anew` that is True, and its `judge` is always called.
    """
    return bool(getattr(teacher, "scores_anew", False))


def reads_changes(teacher: Any) -> bool:
    """Whether this teacher applies `Sequences.embedding_change` to its own embeddings.

    Such a teacher has an attribute `reads_changes` that is True.
    """
    return bool(getattr(teacher, "reads_changes", False))


def changes(teacher: Any) -> bool:
    """Whether this teacher changes during a run, so that it would write something else later.

    A teacher that is a module trains along; one that `Follows` has weights of the student.
    """
    return isinstance(teacher, Module | Follows)


def plain(teacher: Teacher) -> Teacher:
    """Return the teacher that a student is measured against; most teachers are their own.

    A teacher that trains along, or that changes the distribution of its model, has an attribute
    `plain`: a teacher that stays as it is.
    """
    return getattr(teacher, "plain", teacher)
