"""Further forward passes of a training step, for objectives on changed inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.errors import RecipeError
from llmdistill.forward import read, teacher_signal
from llmdistill.models.heads import check_embeddings
from llmdistill.models.placement import at_hand, is_whole
from llmdistill.models.sharding import unshard
from llmdistill.models.taps import Need
from llmdistill.objectives.augment import AugmentedObjective
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Progress, Teacher, reads_changes, scores_anew

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelPasses(NamedTuple):
    """Passes of a student and a teacher; see `objectives.base.Passes`."""

    distillation: Any  # a `training.step.Distillation`
    judge: Teacher
    progress: Progress

    def student(self, sequences: Sequences, needs: frozenset[Need]) -> StudentView:
        """Run the student, with gradients."""
        unshard(self.distillation)
        return read(self.distillation.student, sequences, self.distillation.num_tokens, needs)

    @torch.no_grad()
    def teacher(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Run the teacher, without gradients."""
        signal = teacher_signal(self.judge, sequences, self.distillation.num_tokens, needs)
        assert signal is not None  # something is always needed
        return signal.detach()

    def teacher_with_gradients(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Run the teacher, with gradients to what it reads."""
        teacher: Any = self.judge  # `check_changes` has refused one without `score`
        return teacher.score(sequences, needs).narrow(self.distillation.num_tokens)


def term_sum(
    objective: nn.Module,
    student: StudentView,
    signal: TeacherSignal | None,
    sequences: Sequences,
    passes: ModelPasses | None,
) -> LossSum:
    """Return the sum of one term's losses; `passes` is None in an evaluation."""
    if passes is not None and isinstance(objective, AugmentedObjective):
        return objective.changed(signal, sequences, passes)
    return objective(student, signal, sequences)


def check_changes(
    objectives: Sequence[Objective], student: PreTrainedModel, teacher: Teacher
) -> None:
    """Check that both models can read changed inputs, if an objective changes them.

    Raises RecipeError for a kind of teacher that cannot, and ModelError for a family of models.
    """
    augmented = [one for one in objectives if isinstance(one, AugmentedObjective)]
    for objective in augmented:
        _check_teacher(objective, teacher)
    if augmented:
        check_embeddings(student)
    for model in _models(teacher) if any(one.teacher_reads_changes for one in augmented) else ():
        with at_hand(model):
            check_embeddings(model)


def _models(teacher: Any) -> Iterator[nn.Module]:
    """Yield the models of a teacher, and of the teachers and peers that it consists of."""
    model = getattr(teacher, "model", None)
    if isinstance(model, nn.Module):
        yield model
    yield from getattr(teacher, "peers", ())
    for part in getattr(teacher, "teachers", ()):
        yield from _models(part)


def _check_teacher(objective: AugmentedObjective, teacher: Teacher) -> None:
    """Raise RecipeError if the teacher cannot read changed inputs as the objective needs it."""
    hint = " Set teacher_sees='clean', or use" if hasattr(objective, "teacher_sees") else " Use"
    if objective.teacher_reads_changes and not reads_changes(teacher):
        raise RecipeError(
            f"objective '{objective.name}' changes the embeddings that both models read, which "
            f"{type(teacher).__name__} cannot apply.{hint} a teacher that reads what the student "
            "reads, such as a LocalTeacher."
        )
    if objective.needs_teacher_gradients and not _gives_gradients(teacher):
        raise RecipeError(
            f"objective '{objective.name}' with teacher_sees='changed' needs gradients of the "
            f"teacher, which {type(teacher).__name__} does not have here.{hint} a LocalTeacher "
            "whose model is in one place."
        )


def _gives_gradients(teacher: Any) -> bool:
    """Whether the teacher's signal can be differentiated by what its model reads."""
    return hasattr(teacher, "score") and not scores_anew(teacher) and is_whole(teacher.model)
