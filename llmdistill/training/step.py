"""One step's mathematics.

N = predicted tokens, K = terms of the loss.  `Distillation` is the module that a trainer wraps: the
student, the objectives and a teacher that trains along, all that has parameters.  It has three
entrances: `forward` (one micro-batch: judge and match), `write` (the student writes) and `session`
(it writes token by token).  Nothing else touches the student while it is wrapped.  A frozen teacher
is not part of the module: it is neither saved, nor moved, nor put in training mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from llmdistill.batch import LossSum, Prompts, Sequences
from llmdistill.decoding.sample import sample
from llmdistill.decoding.session import Session, session
from llmdistill.errors import RecipeError
from llmdistill.forward import read, teacher_signal
from llmdistill.models.heads import check_split
from llmdistill.models.taps import Need, check_taps
from llmdistill.models.vocabulary import num_tokens
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Progress, Teacher
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.schedules import Schedule, value
from llmdistill.teachers.base import TrainableTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What Trainer, Accelerate and PEFT look up on the model they train: the student answers.
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
    """`loss` is the weighted sum of all terms, each divided by its divisor of the whole step.

    `terms` are each term's own sum over this micro-batch, and what it adds to the term's divisor;
    neither has a way back for gradients.
    """

    loss: Tensor
    terms: dict[str, tuple[Tensor, Tensor]]


class Distillation(nn.Module):
    """A student and its objectives, with a teacher at hand.

    Raises RecipeError if an objective needs what the teacher does not provide, and ModelError if a
    model does not have what is to be taken from it.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        objectives: Sequence[Objective],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        check_split(student)
        _check_needs(objectives, teacher)
        self.student = student
        self.objectives = nn.ModuleList(objectives)
        self.trained_teacher = teacher if isinstance(teacher, TrainableTeacher) else None
        self._teacher = [teacher]  # in a list: a module in an attribute would become a part of this
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens(tokenizer)
        self.student_needs = frozenset().union(*(one.student_needs for one in objectives))
        self.teacher_needs = frozenset().union(*(one.teacher_needs for one in objectives))
        if self.trained_teacher is not None:
            self.student_needs |= self.trained_teacher.student_needs
            self.teacher_needs |= self.trained_teacher.own_needs
        check_taps(student, self.student_needs)
        teacher_model = getattr(teacher, "model", None)
        if isinstance(teacher_model, nn.Module):  # else it is found when it judges
            check_taps(teacher_model, self.teacher_needs)
        teacher_config = getattr(teacher, "config", None)
        for objective in objectives:
            objective.prepare(student.config.get_text_config(), teacher_config)
        names = [objective.name for objective in objectives]
        self.term_names = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    def forward(self, sequences: Sequences, scales_K: Tensor | None = None) -> StepOutput:
        """One micro-batch: its share of the step's loss.

        `scales_K` are each term's weight divided by its divisor of the whole step, the teacher's
        own term last; without them the micro-batch counts as the whole step.
        """
        if scales_K is None:
            scales_K = self.scales(self.divisors(sequences), START)
        signal = teacher_signal(self.teacher, sequences, self.num_tokens, self.teacher_needs)
        student = read(self.student, sequences, self.num_tokens, self.student_needs)
        seen = None if signal is None else signal.detach()
        sums = {
            name: objective(student, seen, sequences)
            for name, objective in zip(self.term_names, self.objectives, strict=True)
        }
        if self.trained_teacher is not None:
            sums[TEACHER_TERM] = self.trained_teacher(student.detach(), signal, sequences)
        return self._output(sums, self.divisors(sequences), scales_K)

    def _output(self, sums: dict[str, LossSum], divisors_K: Tensor, scales_K: Tensor) -> StepOutput:
        loss = torch.zeros((), device=scales_K.device)
        terms: dict[str, tuple[Tensor, Tensor]] = {}
        for name, count, scale in zip(sums, divisors_K, scales_K, strict=True):
            loss = loss + scale * sums[name].total
            terms[name] = (sums[name].total.detach(), count)
        return StepOutput(loss, terms)

    def divisors(self, sequences: Sequences) -> Tensor:
        """What a batch adds to each term's divisor, the teacher's own last: (K,), integers."""
        terms: list[Any] = [*self.objectives]
        if self.trained_teacher is not None:
            terms.append(self.trained_teacher)
        return torch.stack([term.divisor(sequences) for term in terms]).long()

    def weights(self, progress: Progress) -> dict[str, float]:
        """Each objective's weight now."""
        return {name: value(weight, progress) for name, weight in self._weights()}

    @property
    def scheduled(self) -> list[str]:
        """The objectives whose weight changes."""
        return [name for name, weight in self._weights() if callable(weight)]

    def _weights(self) -> list[tuple[str, float | Schedule]]:
        objectives: list[Any] = [*self.objectives]
        return [
            (name, objective.weight)
            for name, objective in zip(self.term_names, objectives, strict=True)
        ]

    def scales(self, divisors_K: Tensor, progress: Progress) -> Tensor:
        """Each term's weight over its divisor, the teacher's own last: (K,), on their device."""
        weights = list(self.weights(progress).values())
        if self.trained_teacher is not None:
            weights.append(self.trained_teacher.weight)
        return torch.tensor(weights, device=divisors_K.device) / divisors_K.clamp_min(1)

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """The student's own responses, in eval mode and without gradients."""
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
        """The student as something that can be stepped: for interleaved writing."""
        return session(self.student, self.tokenizer, prompts)

    def parameter_groups(self) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
        """Trainable parameters by who owns them, each under its name in this module."""
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
        if name in FORWARDED_TO_STUDENT:
            return getattr(super().__getattr__("student"), name)
        return super().__getattr__(name)


def _check_needs(objectives: Sequence[Objective], teacher: Teacher) -> None:
    """Raises RecipeError that names an objective and a teacher which do not fit."""
    for objective in objectives:
        missing = {need.kind for need in objective.teacher_needs} - teacher.provides
        if missing:
            raise RecipeError(
                f"objective '{objective.name}' needs {_listed(missing)} from the teacher, but "
                f"{type(teacher).__name__} provides {_listed(teacher.provides)}. Choose another "
                "objective or another teacher."
            )


def _listed(needs: set[Need] | frozenset[Need]) -> str:
    return ", ".join(sorted(map(str, needs))) or "nothing"
