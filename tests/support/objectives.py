"""An objective with parameters, and modes that record how large tensors become."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmdistill.batch import LossSum
from llmdistill.forward import read, teacher_signal
from llmdistill.objectives.augment import AugmentedObjective
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Progress
from llmdistill.training.passes import ModelPasses
from tests import toy


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation produced."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


class NewTensors(TorchDispatchMode):
    """Records the operations that allocate a result of at least `size` elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            is_large = isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size
            if is_large and tensor.untyped_storage().data_ptr() not in given:
                self.names.append(function.name().partition(".")[0])
        return result


def prepared(objective, student, teacher):
    """Return the objective, prepared for this student and this teacher."""
    objective.prepare(student.config, teacher.config)
    return objective


def passes(student, teacher, step=0, seed=0):
    """Return the passes of a training step, for an objective that makes further ones."""
    models = SimpleNamespace(student=student, num_tokens=toy.NUM_TOKENS)
    return ModelPasses(models, teacher, Progress(step=step, epoch=0, seed=seed))


def loss(objective, student, teacher, sequences, **progress):
    """Return the loss of a prepared objective on some sequences, in a training step."""
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, objective.teacher_needs)
    if isinstance(objective, AugmentedObjective):
        return objective.changed(signal, sequences, passes(student, teacher, **progress))
    view = read(student, sequences, toy.NUM_TOKENS, objective.student_needs)
    return objective(view, signal, sequences)


class Projected(Objective):
    """A term with its own parameter, large enough for clipping to matter."""

    name = "projected"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.projector = nn.Linear(32, 4, bias=False)
        self.scale = scale

    def forward(self, student, signal, sequences):
        total = self.scale * self.projector(student.hidden_NH).square().sum()
        return LossSum(total, sequences.num_predicted.sum())
