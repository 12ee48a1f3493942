"""Who takes part in a step, and what each of them must be able to do.

B = rows, T = tokens, N = predicted tokens.  A class takes part by having these methods; it need not
inherit.  On several ranks each method is called by every rank with that rank's own rows.  Nothing
here may draw from a global random generator: what is random follows from a `Draw`, or from the seed
and step of `Progress`, so that a row is written the same on any number of ranks and after a resume.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.models.taps import Need as Need
from llmdistill.sampling import Draw, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Progress:
    """Where training is when a batch is written: `step` of `num_steps` steps are done.

    `epoch` counts passes over the data.  `eval_losses` are the held-out losses so far, the oldest
    first.
    """

    step: int
    epoch: int
    seed: int
    num_steps: int = 0
    eval_losses: tuple[float, ...] = ()


@runtime_checkable
class Writes(Protocol):
    """A model that can write: a teacher that can, or the student inside its wrapper."""

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """Each prompt with one response of at most `max_new_tokens` tokens, in the prompts' order.

        The sequences are on the CPU, padded on the right.  A response holds its end token if it
        has ended.  The writer runs in eval mode without gradients and is left as it was.  The only
        randomness is that of `draw` with the row id, so a response does not depend on its batch.
        """


@runtime_checkable
class Steps(Protocol):
    """A model that can write token by token in turn with another one, for interleaved rollouts."""

    def session(self, prompts: Prompts) -> AbstractContextManager[Any]:
        """A `decoding.session.Session` over these prompts: a cache that can be extended and can
        take tokens back, row by row.
        """


class Student(Writes, Steps, Protocol):
    """The student as a rollout sees it."""


class Teacher(Protocol):
    """Who judges what was written.

    `tokenizer` must hold the student's vocabulary.  `provides` lists what can be asked for:
    `Need.DISTRIBUTION`, `Need.HIDDEN` and so on.  A teacher that provides states also has `config`,
    the transformers configuration of the model that they come from.  One that can also write has
    `write` (`Writes`), perhaps `session` (`Steps`), and `ends`, the ids that end what it writes.
    One that trains along is a `teachers.base.TrainableTeacher`.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def provides(self) -> frozenset[Need]: ...

    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """What it says of the N predicted tokens, row by row: all that `needs` asks for.

        `sequences` may be on any device.  The signal stays on the teacher's.  Called once per
        micro-batch, unless the sequences bring a signal that covers the needs.
        """


class Rollout(Protocol):
    """Who writes the tokens that the student learns on."""

    def write(
        self, prompts: Prompts, student: Student, teacher: Any, progress: Progress
    ) -> Sequences:
        """The prompts of a whole accumulation window with a response each, in their order.

        Rows must come back one for one: the trainer knows filler rows by their place.  `teacher` is
        the run's `Teacher`; a rollout that needs it to write says so in its error if it cannot.
        """


@runtime_checkable
class Stateful(Protocol):
    """A rollout whose memory belongs in a checkpoint; each rank saves and loads its own."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next `write` depends on, as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""


def steps_both_models(rollout: Rollout) -> bool:
    """Do both models make passes in turn while this rollout writes?

    A rollout that does sets `steps_both_models`; the number of passes then differs between ranks.
    """
    return bool(getattr(rollout, "steps_both_models", False))
