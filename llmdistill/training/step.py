"""The mathematics of one step.

H = hidden size, N = predicted tokens, n = those of one block, K = terms of the loss, M = MEASURES.

`Distillation` is the module that a trainer wraps.  It contains everything that is trained: the
student, the objectives, and a trainable teacher.
Code outside reaches the wrapped student through three methods only: `forward` (score and compare
one micro-batch), `write` (the student writes responses) and `session` (it writes token by token).
The last two are called within `with_whole_weights`, because weights may be spread over the ranks.
A frozen teacher is not part of the module, so it is not saved, moved or put in training mode.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from llmdistill.batch import Prompts, Sequences, StudentView
from llmdistill.decoding.sample import sample
from llmdistill.decoding.session import Session, session
from llmdistill.distributions import Distribution
from llmdistill.errors import RecipeError, TrainingError
from llmdistill.evaluation.agreement import MEASURES, closeness
from llmdistill.forward import read, teacher_signal
from llmdistill.models.heads import check_split
from llmdistill.models.taps import STATES, Need, check_taps
from llmdistill.models.vocabulary import num_tokens
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Progress, Teacher, plain
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.schedules import value
from llmdistill.teachers.base import TrainableTeacher
from llmdistill.training.passes import ModelPasses, check_changes, term_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("llmdistill")
T = TypeVar("T")

# Attributes that Trainer, Accelerate and PEFT look up on the model that they train.  The student's
# values are returned.
FORWARDED_TO_STUDENT = (
    "config",
    "activation_checkpointing_enable",
    "_no_split_modules",
    "tie_weights",
    "get_input_embeddings",
    "get_output_embeddings",
    "_keys_to_ignore_on_save",
)
START = Progress(step=0, epoch=0, seed=0)
TEACHER_TERM = "teacher"


class StepOutput(NamedTuple):
    """Loss of one micro-batch, and the numbers to log.

    `loss` is the weighted sum of all terms, each divided by its divisor of the whole step.
    `terms` maps each term to its unweighted sum over the micro-batch and to what the micro-batch
    adds to the term's divisor; both are detached.  In an evaluation it also has MEASURES of
    `evaluation/agreement.py`, if the objectives need the teacher's distributions.
    """

    loss: Tensor
    terms: dict[str, tuple[Tensor, Tensor]]


class Distillation(nn.Module):
    """A student and its objectives, with access to the teacher.

    Raises RecipeError if there are no objectives or the teacher does not provide what one of them
    needs.  Raises ModelError if a model has no head that can be split off, or lacks a layer from
    which a state is taken.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        objectives: Sequence[Objective],
        tokenizer: PreTrainedTokenizerBase,
        measured_against: Teacher | None = None,
    ) -> None:
        super().__init__()
        check_split(student)
        _check_needs(objectives, teacher)
        self.student = student
        self.objectives = nn.ModuleList(objectives)
        self.trained_teacher = teacher if isinstance(teacher, TrainableTeacher) else None
        self._teacher_learns = False
        # nn.Module registers a module in an attribute as its own part, but not one in a list.
        self._teacher = [teacher]
        self._measured_against = [plain(teacher) if measured_against is None else measured_against]
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens(tokenizer)
        teacher_config = getattr(teacher, "config", None)
        for objective in objectives:  # this also chooses the layers that they need
            objective.prepare(student.config.get_text_config(), teacher_config)
            objective.start_from(student)
            _warn_about_rates(objective)
        check_changes(objectives, student, teacher)
        self.student_needs, self.teacher_needs = _needs(objectives, self.trained_teacher)
        check_taps(student, self.student_needs)
        teacher_model = getattr(teacher, "model", None)
        if isinstance(teacher_model, nn.Module):  # any other teacher is checked when it scores
            check_taps(teacher_model, self.teacher_needs)
        self.term_names = _term_names(objectives, self.trained_teacher)
        self.objective_names = self.term_names[: len(objectives)]
        measures = MEASURES if Need.DISTRIBUTION in self.teacher_needs else ()
        self.measured_names = [*self.objective_names, *measures]  # of an evaluation

    @property
    def teacher(self) -> Teacher:
        """The run's teacher, frozen or trained."""
        return self._teacher[0]

    def forward(
        self, sequences: Sequences, scales_K: Tensor | None = None, progress: Progress = START
    ) -> StepOutput:
        """Return one micro-batch's share of the step's loss.

        `scales_K` contains each term's weight divided by its divisor of the whole step, with the
        teacher's own term last.  Without it the micro-batch counts as the whole step, and weights
        are those of the first step.  `progress` decides how inputs are changed.
        """
        divisors_K = self.divisors(sequences)
        if scales_K is None:
            scales_K = self.scales(divisors_K, START)
        trained = self.trained_teacher
        # In an evaluation the teacher is one that stays as it is, so that losses can be compared.
        learns = self.training and trained is not None and bool(scales_K[-1])
        teacher = self.teacher if self.training else self._measured_against[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            signal = teacher_signal(teacher, sequences, self.num_tokens, self.teacher_needs)
        student = read(self.student, sequences, self.num_tokens, self.student_needs)
        # Gradients do not cross: objectives train the student alone, and the teacher's own loss
        # trains the teacher alone.
        seen = None if signal is None else signal.detach()
        passes = ModelPasses(self, teacher, progress)
        parts = (student, seen, sequences, passes if self.training else None)
        sums = [term_sum(one, *parts) for one in self.objectives]
        if learns and trained is not None:
            sums.append(trained(student.detach(), signal, sequences))
        loss = torch.zeros((), device=scales_K.device)
        for scale, one in zip(scales_K, sums, strict=False):
            loss = loss + scale * one.total
        self._teacher_learns = learns
        if self.training:  # DDP waits for a gradient of every parameter; the trainer drops zeros
            loss = loss + sum(0.0 * parameter.sum() for parameter in self.idle_parameters())
        columns = zip(self.term_names, sums, divisors_K, strict=False)
        terms = {name: (one.total.detach(), count) for name, one, count in columns}
        if learns and trained is not None:
            terms |= trained.figures
        if not self.training and seen is not None and seen.distribution is not None:
            terms |= _measures(student, seen.distribution)
        return StepOutput(loss, terms)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the last step must not change.

        They are those of a trained teacher whose weight was 0 in that step.
        """
        if self.trained_teacher is None or self._teacher_learns:
            return []
        return [p for p in self.trained_teacher.parameters() if p.requires_grad]

    @property
    def terms(self) -> list[Any]:
        """Terms of the loss: the objectives, then the teacher if it trains along."""
        teacher = [] if self.trained_teacher is None else [self.trained_teacher]
        return [*self.objectives, *teacher]

    def divisors(self, sequences: Sequences) -> Tensor:
        """Return what a batch adds to each term's divisor: (K,), integers.

        Raises TrainingError if a term's divisor is not an integer.
        """
        counts = [term.divisor(sequences) for term in self.terms]
        for name, count in zip(self.term_names, counts, strict=True):
            if count.is_floating_point():
                raise TrainingError(
                    f"the divisor of '{name}' is {count:g}, but it must be a count. Return an "
                    "integer tensor from its divisor."
                )
        return torch.stack(counts)

    def weights(self, progress: Progress) -> dict[str, float]:
        """Return each term's weight at this point of training."""
        pairs = zip(self.term_names, self.terms, strict=True)
        return {name: value(term.weight, progress) for name, term in pairs}

    def scales(self, divisors_K: Tensor, progress: Progress) -> Tensor:
        """Return each term's weight divided by its divisor: (K,), on the device of `divisors_K`."""
        weights = list(self.weights(progress).values())
        # If a divisor is 0, no rank has anything to sum, and the term is 0 as well.
        return torch.tensor(weights, device=divisors_K.device) / divisors_K.clamp_min(1)

    @property
    def exported(self) -> PreTrainedModel:
        """The model to export: the student, or what an objective makes of it."""
        made = [one.exported(self.student) for one in self.objectives]  # type: ignore[operator]
        return next((one for one in made if one is not None), self.student)

    def exported_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the student has the weights that are exported.

        They are its own, unless the teacher keeps others for the export, such as an average.
        """
        return getattr(self.teacher, "exported", contextlib.nullcontext)()

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """Write one response to each prompt with the student, in eval mode without gradients."""
        return sample(
            self.student,
            self.tokenizer,
            prompts,
            sampling,
            max_new_tokens=max_new_tokens,
            draw=draw,
            writer=Writer.STUDENT,
        )

    def session(self, prompts: Prompts) -> AbstractContextManager[Session]:
        """Return a session in which the student writes token by token (interleaved rollouts)."""
        return session(self.student, self.tokenizer, prompts)

    def with_whole_weights(self, work: Callable[[], T]) -> T:
        """Do some work for which the student runs, such as writing, and return its result.

        FSDP2 gathers weights for this method as it does for a forward pass.  It would move tensors
        among the arguments to a GPU, so the work has none.
        """
        return work()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates of parameters that do not have the student's, by name in this module."""
        return dict(_own_rates(self))

    def parameter_groups(self) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
        """Yield each owner with its trainable parameters, by their names in this module.

        Owners are `student`, `projectors` and `teacher`; those without trainable parameters are
        left out.
        """
        owners = {
            "student": "student",
            "projectors": "objectives",
            "teacher": "trained_teacher",
        }
        for group, name in owners.items():
            module = getattr(self, name)
            trained = {
                f"{name}.{key}": parameter
                for key, parameter in (module.named_parameters() if module is not None else ())
                if parameter.requires_grad
            }
            if trained:
                yield group, trained

    def __getattr__(self, name: str) -> Any:
        # Python calls this for names that it does not find elsewhere; nn.Module finds submodules.
        if name in FORWARDED_TO_STUDENT:
            return getattr(super().__getattr__("student"), name)
        return super().__getattr__(name)


def _term_names(objectives: Sequence[Objective], trained: TrainableTeacher | None) -> list[str]:
    """Return the names of the terms of the loss, which are columns of the log."""
    names = [objective.name for objective in objectives]
    names += [TEACHER_TERM] * (trained is not None)
    # Equal names get their position appended.
    return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _needs(
    objectives: Sequence[Objective], trained: TrainableTeacher | None
) -> tuple[frozenset[Need], frozenset[Need]]:
    """Return what the terms of the loss need of the student, and what of the teacher."""
    ours = frozenset().union(*(one.student_needs for one in objectives))
    theirs = frozenset().union(*(one.teacher_needs for one in objectives))
    if trained is not None:
        return ours | trained.student_needs, theirs | trained.own_needs
    return ours, theirs


def _measures(student: StudentView, distribution: Distribution) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each of MEASURES as its sum over the predicted tokens, and their number."""
    count = torch.tensor(len(student.hidden_NH))
    sums_M = sum(
        (figures_nM.double().sum(0) for figures_nM in closeness(student, distribution)),
        start=torch.zeros(len(MEASURES), dtype=torch.float64),
    )
    return {name: (total, count) for name, total in zip(MEASURES, sums_M, strict=True)}


def _own_rates(distillation: Distillation) -> Iterator[tuple[str, float]]:
    """Yield each parameter that does not have the student's learning rate, with its rate."""
    for place, one in enumerate(distillation.objectives):
        rate = one.projector_learning_rate if isinstance(one, Objective) else None
        if rate is not None:
            yield from ((f"objectives.{place}.{name}", rate) for name, _ in one.named_parameters())
    trained = distillation.trained_teacher
    if trained is not None and (rate := trained.learning_rate) is not None:
        yield from ((f"trained_teacher.{name}", rate) for name, _ in trained.named_parameters())


def _warn_about_rates(objective: Objective) -> None:
    """Warn about a learning rate for projectors that the objective does not have."""
    has_none = next(objective.parameters(), None) is None
    if objective.projector_learning_rate is not None and has_none:
        logger.warning(
            "objective '%s' has no projectors, because the models have the same width, so its "
            "projector_learning_rate has no effect",
            objective.name,
        )


def _check_needs(objectives: Sequence[Objective], teacher: Teacher) -> None:
    """Raise RecipeError if the teacher does not provide what an objective needs."""
    if not objectives:
        raise RecipeError(
            "objectives: the list is empty, so there is nothing to train on. Add at least one."
        )
    for objective in objectives:
        kinds = {need.kind for need in objective.teacher_needs}
        missing = kinds - teacher.provides
        if missing:
            raise RecipeError(
                f"objective '{objective.name}' needs {_listed(missing)} from the teacher, but "
                f"{type(teacher).__name__} provides {_listed(teacher.provides)}. Use another "
                "objective or another teacher."
            )
        # An objective on states needs the number of layers and their width.
        if kinds & STATES and getattr(teacher, "config", None) is None:
            raise RecipeError(
                f"objective '{objective.name}' needs {_listed(kinds)}, but "
                f"{type(teacher).__name__} has no 'config' that gives their sizes. Set its config "
                "to the configuration of its model."
            )


def _listed(needs: set[Need] | frozenset[Need]) -> str:
    """Return the needs in words, in a fixed order."""
    return ", ".join(sorted(map(str, needs))) or "nothing"
