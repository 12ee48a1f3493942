"""One step's mathematics.

N = predicted tokens, H = hidden size, V = vocabulary. `Distillation` is the module that a trainer
wraps: the student and the objectives, all that has parameters.  It has three entrances: `forward`
(one micro-batch: judge and match), `write` (the student writes) and `session` (it writes token by
token).  Nothing else touches the student while it is wrapped.  A frozen teacher is not part of the
module: it is neither saved, nor moved, nor put in training mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from llmdistill.batch import Prompts, Sequences, StudentView
from llmdistill.decoding.sample import sample
from llmdistill.decoding.session import Session, session
from llmdistill.forward import final_hidden
from llmdistill.models.heads import check_split, split
from llmdistill.models.vocabulary import num_tokens
from llmdistill.objectives.base import Objective
from llmdistill.protocols import Teacher
from llmdistill.sampling import Draw, Sampling, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What Trainer, Accelerate and PEFT look up on the model they train: the student answers.
PASSED_ON = (
    "config",
    "activation_checkpointing_enable",
    "_no_split_modules",
    "tie_weights",
    "get_input_embeddings",
    "get_output_embeddings",
    "_keys_to_ignore_on_save",
)


class StepOutput(NamedTuple):
    """The weighted sum of all objectives, the number of predicted tokens, and each objective's own
    sum.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment] # a tuple has a method of this name
    terms: dict[str, Tensor]


class Distillation(nn.Module):
    """A student and its objectives, with a teacher at hand."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        objectives: Sequence[Objective],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        check_split(student)
        self.student = student
        self.objectives = nn.ModuleList(objectives)
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens(tokenizer)
        self.needs = frozenset().union(*(objective.needs for objective in objectives))
        names = [objective.name for objective in objectives]
        self.term_names = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]

    def forward(self, sequences: Sequences) -> StepOutput:
        """Sums over the micro-batch's predicted tokens; the caller divides by the step's global
        count.
        """
        signal = sequences.signal
        if signal is None and self.needs:
            signal = self.teacher.judge(sequences, self.needs)
        if signal is not None:
            signal = replace(signal, head=signal.head.narrow(self.num_tokens))
        backbone, head = split(self.student)
        view = StudentView(final_hidden(backbone, sequences), head.narrow(self.num_tokens))
        total = view.hidden_NH.new_zeros((), dtype=torch.float32)
        terms: dict[str, Tensor] = {}
        for name, objective in zip(self.term_names, self.objectives, strict=True):
            loss = objective(view, signal, sequences)
            total = total + objective.weight * loss.total
            terms[name] = loss.total.detach()
        return StepOutput(total, sequences.num_predicted.sum(), terms)

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """The student's own answers, in eval mode and without gradients."""
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
        for group, module in (("student", "student"), ("projectors", "objectives")):
            trained = {
                f"{module}.{name}": parameter
                for name, parameter in getattr(self, module).named_parameters()
                if parameter.requires_grad
            }
            if trained:
                yield group, trained

    def __getattr__(self, name: str) -> Any:
        if name in PASSED_ON:
            return getattr(super().__getattr__("student"), name)
        return super().__getattr__(name)
