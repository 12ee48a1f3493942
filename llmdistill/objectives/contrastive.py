"""Contrastive objectives: each response of the student against those of its teacher.

B = rows of this rank, N = predicted tokens, S = samples (responses of all ranks), D = width of a
state, E = width of the shared space, K = vectors in a queue.

A response is one vector of each model, pooled from its states.  Linear projectors bring both into
one space of unit vectors.  Responses to the same prompt are never negatives of each other.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.batch import Sequences
from llmdistill.objectives.layer_maps import LAST_LAYERS, Layers
from llmdistill.objectives.queues import Queue
from llmdistill.objectives.samples import (
    Pool,
    PooledObjective,
    gather,
    gather_together,
    pooled,
    prompt_keys,
    share_of,
    shared,
)
from llmdistill.objectives.states import Compared, projected, tokens_of_rows
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WIDTH = 128  # of the shared space, in all three papers
HOTTEST = 10.0  # the largest factor on the similarities in ICD


def info_nce(similarity_SK: Tensor, positive_S: Tensor, allowed_SK: Tensor) -> Tensor:
    """Return the mean of -log softmax at each row's positive, over the allowed columns: ().

    van den Oord et al. 2018 (CPC), eq. 4.
    """
    scores_SK = similarity_SK.masked_fill(~allowed_SK, -torch.inf)
    return nn.functional.cross_entropy(scores_SK, positive_S)


def disagreement(similarity_SS: Tensor, allowed_SS: Tensor) -> Tensor:
    """Return how much two ways of matching differ: ().

    KL(P || Q) in nats, the mean over the samples, where Q is the distribution of each student's
    response over the teacher's, and P that of each teacher's response over the student's.  It is 0
    for a symmetric matrix.  Giakoumoglou and Stathaki 2024 (ICD), the invariance term.
    """
    scores_SS = similarity_SS.masked_fill(~allowed_SS, -torch.inf)
    log_q_SS, log_p_SS = scores_SS.log_softmax(1), scores_SS.T.log_softmax(1)
    # Both are -inf where a pair is not allowed, and add nothing there.
    gap_SS = (log_p_SS - log_q_SS).masked_fill(~allowed_SS, 0.0)
    return (log_p_SS.exp() * gap_SS).sum(1).mean()


def relational(
    student_SK: Tensor, teacher_SK: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Return the cross-entropy of two distributions over the queue, the mean over the samples: ().

    -sum_K softmax(teacher / t_teacher) log softmax(student / t_student), in nats.  It is at least
    the entropy of the first.  Giakoumoglou and Stathaki 2024 (RRD).
    """
    target_SK = (teacher_SK / teacher_temperature).softmax(1)
    return -(target_SK * (student_SK / student_temperature).log_softmax(1)).sum(1).mean()


class ContrastiveObjective(PooledObjective):
    """Base of objectives that contrast the responses of a batch, in a space of unit vectors.

    A subclass implements `contrast`.

    Args:
        width: Width E of the shared space.
        pool, layers, weight: As in `PooledObjective`.
        projector_learning_rate: Learning rate of the objective's own parameters.  None is that of
            the student.
    """

    trains_teacher_projector = True

    def __init__(
        self,
        *,
        width: int = WIDTH,
        pool: str | Pool = "mean",
        layers: Layers = LAST_LAYERS,
        weight: float | Schedule = 1.0,
        projector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(
            pool=pool,
            layers=layers,
            weight=weight,
            projector_learning_rate=projector_learning_rate,
        )
        self.width = width
        self.student_projectors, self.teacher_projectors = nn.ModuleList(), nn.ModuleList()

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers, and create a projector of each model for each pair of them."""
        super().prepare(student, teacher)
        assert teacher is not None
        for config, made in (
            (student, self.student_projectors),
            (teacher, self.teacher_projectors),
        ):
            made.extend(nn.Linear(config.hidden_size, self.width) for _ in self.needs)
        self.teacher_projectors.requires_grad_(self.trains_teacher_projector)

    def compare(self, states: Sequence[Compared], sequences: Sequences) -> Tensor:
        """Return the mean loss of all ranks' samples, times this rank's samples."""
        counts = tokens_of_rows(sequences, self.tokens)
        own = [unit for place in range(len(states)) for unit in self._units(place, states, counts)]
        # Projectors run before the samples are gathered: a rank computes gradients for its rows.
        parts = gather_together(own)
        prompt_S = gather(prompt_keys(sequences))
        # Parameters that a small batch does not use still get a gradient, for which DDP waits.
        unused = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
        if len(prompt_S) < self.least_rows:
            return unused + torch.stack([part.sum() for part in parts]).sum() * 0.0
        losses = [
            self.contrast(place, mine_SE, other_SE, prompt_S)
            for place, (mine_SE, other_SE) in enumerate(zip(parts[::2], parts[1::2], strict=True))
        ]
        self.remember(parts[1::2], prompt_S)
        return unused + share_of(torch.stack(losses).mean(), len(counts), len(prompt_S))

    def _units(
        self, place: int, states: Sequence[Compared], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's unit vectors of both models for a pair of layers: (B, E) each."""
        projectors = (self.student_projectors[place], self.teacher_projectors[place])
        sides = (pooled(side_ND, counts, self.pool) for side_ND in states[place])
        mine_BE, other_BE = (
            nn.functional.normalize(projected(projector, side_BD), dim=1)
            for projector, side_BD in zip(projectors, sides, strict=True)
        )
        return mine_BE, other_BE

    @abc.abstractmethod
    def contrast(
        self, place: int, student_SE: Tensor, teacher_SE: Tensor, prompt_S: Tensor
    ) -> Tensor:
        """Return the loss of all samples together, for the pair of layers at `place`: ().

        `prompt_S` has a key of each sample's prompt.
        """

    def remember(self, teacher_SE: Sequence[Tensor], prompt_S: Tensor) -> None:
        """Keep the teacher's vectors of a batch, one tensor for each pair of layers."""


class IcdObjective(ContrastiveObjective):
    """Invariant consistency distillation: find the teacher's response, and agree on the match.

    The similarities are multiplied by a trained factor, which starts at e and is at most 10.  The
    loss is InfoNCE with the negatives of the batch, plus `invariance` times `disagreement`.
    Giakoumoglou and Stathaki 2024 (ICD, arXiv 2407.11802).  The paper also adds a trained number to
    all similarities, which changes no softmax and is left out.

    Args:
        invariance: Factor on `disagreement`.  The default is that of the paper's code.
        options: The arguments of `ContrastiveObjective`.
    """

    name = "icd"
    advised_rows = 16

    def __init__(
        self,
        *,
        invariance: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.invariance = invariance
        self.log_scale = nn.Parameter(torch.ones(1))  # FSDP2 shards no scalars

    def contrast(
        self, place: int, student_SE: Tensor, teacher_SE: Tensor, prompt_S: Tensor
    ) -> Tensor:
        """Return InfoNCE plus the weighted disagreement: ()."""
        scale = shared(self.log_scale).clamp(max=math.log(HOTTEST)).exp()
        similarity_SS = scale * (student_SE @ teacher_SE.T)
        own_S = torch.arange(len(prompt_S), device=prompt_S.device)
        allowed_SS = (prompt_S[:, None] != prompt_S) | (own_S[:, None] == own_S)
        found = info_nce(similarity_SS, own_S, allowed_SS)
        return found + self.invariance * disagreement(similarity_SS, allowed_SS)


class QueuedObjective(ContrastiveObjective):
    """Base of contrastive objectives that compare with responses of earlier batches.

    The queue is the same on all ranks, has no gradient, and is part of a checkpoint.  A held-out
    loss reads it and leaves it as it is.

    Args:
        queue_size: The most vectors of the teacher that are kept for each pair of layers.
        options: The arguments of `ContrastiveObjective`.
    """

    def __init__(
        self,
        *,
        queue_size: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.queue_size = queue_size

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers, and create the projectors and an empty queue."""
        super().prepare(student, teacher)
        self.queue = Queue(self.queue_size, len(self.needs), self.width)

    def remember(self, teacher_SE: Sequence[Tensor], prompt_S: Tensor) -> None:
        """Add the teacher's vectors of all ranks to the queue, in a training step."""
        if torch.is_grad_enabled():
            self.queue.add(teacher_SE, prompt_S)


class CrdObjective(QueuedObjective):
    """Contrastive representation distillation: find the teacher's response among many others.

    InfoNCE with the teacher's vector of the same response as the positive.  The negatives are the
    teacher's vectors of other prompts, in the batch and in the queue.  Tian et al. 2020 (CRD), with
    the queue of He et al. 2020 (MoCo) in place of the memory bank.

    Args:
        temperature: Divisor of the similarities.  The default is that of the paper.
        options: The arguments of `QueuedObjective`.
    """

    name = "crd"

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def contrast(
        self, place: int, student_SE: Tensor, teacher_SE: Tensor, prompt_S: Tensor
    ) -> Tensor:
        """Return InfoNCE over the batch and the queue: ()."""
        kept_KE, kept_K = self.queue.vectors_of(place)
        own_S = torch.arange(len(prompt_S), device=prompt_S.device)
        similarity_SK = torch.cat([student_SE @ teacher_SE.T, student_SE @ kept_KE.T], 1)
        other_SK = prompt_S[:, None] != torch.cat([prompt_S, kept_K])
        other_SK[own_S, own_S] = True
        return info_nce(similarity_SK / self.temperature, own_S, other_SK)


class RrdObjective(QueuedObjective):
    """Relational representation distillation: be as similar to earlier responses as the teacher is.

    The queue gets the batch first.  Then the student's similarities to it follow the teacher's,
    `relational`.  The projector of the teacher is random and stays as it is, as in the released
    code, and its target has no gradient.  Giakoumoglou and Stathaki 2024 (RRD, arXiv 2407.12073).

    Args:
        student_temperature: Divisor of the student's similarities.
        teacher_temperature: Divisor of the teacher's, which is smaller, so that the target is
            sharper.  The defaults are those of the released training script.
        options: The arguments of `QueuedObjective`.
    """

    name = "rrd"
    trains_teacher_projector = False

    def __init__(
        self,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature

    def contrast(
        self, place: int, student_SE: Tensor, teacher_SE: Tensor, prompt_S: Tensor
    ) -> Tensor:
        """Return the cross-entropy of the similarities to the batch and the queue: ()."""
        kept_KE, _ = self.queue.vectors_of(place, room=self.queue_size - len(teacher_SE))
        teacher_SE = teacher_SE.detach()
        student_SK, target_SK = (
            torch.cat([side_SE @ teacher_SE.T, side_SE @ kept_KE.T], 1)
            for side_SE in (student_SE, teacher_SE)
        )
        return relational(student_SK, target_SK, self.student_temperature, self.teacher_temperature)
