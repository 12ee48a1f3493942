"""Objectives on relations between the responses of a batch.

S = samples (responses of all ranks), D = width of a state.  A relation is a matrix over pairs of
samples, or a tensor over triplets, so the models may differ in width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from llmdistill.errors import ModelError
from llmdistill.objectives.choices import choose
from llmdistill.objectives.eager import eager_sum
from llmdistill.objectives.layer_maps import LAST_LAYERS, Layers, Pairs
from llmdistill.objectives.samples import Pool, SampleObjective
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Kernel = Callable[[Tensor], Tensor]  # samples (S, D) -> similarities (S, S), above 0
smooth_l1 = nn.functional.smooth_l1_loss
EXACT = "donot_use_mm_for_euclid_dist"
CLOSE = 1e-3  # share of the mean distance below which two samples count as nearly equal


def distance_loss(student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
    """Compare the distances between samples: ().

    The mean over all pairs of smooth_l1(d_student, d_teacher), where each model's distances are
    divided by their mean over the pairs that are apart.  Park et al. 2019 (RKD), RKD-D.
    """
    return smooth_l1(_relative_distances(student_SD), _relative_distances(teacher_SD))


def angle_loss(student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
    """Compare the angles between samples: ().

    The mean over all triplets of smooth_l1(cos_student, cos_teacher), with the cosine of the angle
    at the second sample of the triplet.  Park et al. 2019 (RKD), RKD-A.
    """
    student, teacher = _closest(student_SD), _closest(teacher_SD)

    def at_corner(j: int, student_SD: Tensor) -> Tensor:
        angles = (_angles(student_SD, j, student), _angles(teacher_SD, j, teacher))
        return smooth_l1(*angles, reduction="sum")

    # One corner at a time: S^3 angles are never in memory.
    return eager_sum(at_corner, len(student_SD), student_SD) / max(len(student_SD), 1) ** 3


def _relative_distances(samples_SD: Tensor) -> Tensor:
    # cdist's faster mode loses the digits of small distances, and its gradient at 0 is 0.
    distance_SS = torch.cdist(samples_SD, samples_SD, compute_mode=EXACT)
    mean = distance_SS.sum() / (distance_SS > 0).sum().clamp_min(1)
    # Differences of samples that nearly coincide are rounding errors.
    least = CLOSE**2 * torch.linalg.vector_norm(samples_SD.detach(), dim=1).mean() + 1e-12
    return distance_SS / mean.clamp_min(least)


def _angles(samples_SD: Tensor, j: int, closest: Tensor) -> Tensor:
    """Return the cosines of the angles at sample j between all pairs of other samples: (S, S).

    Edges shorter than `closest` count as shorter than 1, because their direction is mostly noise.
    """
    edge_SD = samples_SD - samples_SD[j]
    # The square root of a clamped square has a gradient at 0, unlike a norm.
    length_S1 = edge_SD.square().sum(1, keepdim=True).clamp_min(closest**2).sqrt()
    unit_SD = edge_SD / length_S1
    return unit_SD @ unit_SD.T


def _closest(samples_SD: Tensor) -> Tensor:
    """Return the length below which a difference of two samples has no direction: ()."""
    samples_SD = samples_SD.detach()
    distance_SS = torch.cdist(samples_SD, samples_SD, compute_mode=EXACT)
    return CLOSE * distance_SS.sum() / (distance_SS > 0).sum().clamp_min(1) + 1e-12


def similarity_loss(student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
    """Compare the similarities between samples: ().

    The mean squared difference of the Gram matrices, whose rows are divided by their lengths.
    Tung and Mori 2019 (SP).
    """
    unit = nn.functional.normalize
    student_SS = unit(student_SD @ student_SD.T, dim=1)
    teacher_SS = unit(teacher_SD @ teacher_SD.T, dim=1)
    return (student_SS - teacher_SS).square().mean()


def cosine_kernel(samples_SD: Tensor) -> Tensor:
    """Compare samples by the angle between them, whatever their length.

    (cos + 1) / 2, for each pair: (S, S), from 0 to 1.  Passalis et al. 2020.  There are no options.
    """
    unit_SD = nn.functional.normalize(samples_SD, dim=1)
    return ((unit_SD @ unit_SD.T + 1) / 2).clamp_min(1e-12)


def student_t_kernel(samples_SD: Tensor) -> Tensor:
    """Compare samples by the distance between them, which includes their length.

    1 / (1 + distance), for each pair: (S, S), from 0 to 1.  Passalis et al. 2020.  There are no
    options.
    """
    return 1 / (1 + torch.cdist(samples_SD, samples_SD, compute_mode=EXACT))


# Recipes read the names with `ast`, so the table must stay a dict literal.
KERNELS: dict[str, Kernel] = {"cosine": cosine_kernel, "student_t": student_t_kernel}


def pkt_loss(student_SD: Tensor, teacher_SD: Tensor, kernel: Kernel) -> Tensor:
    """Compare how probable each sample is as a neighbour of each other one: ().

    The mean over all pairs of (P - Q) (log P - log Q), with P and Q the kernels of teacher and
    student, whose rows are divided by their sums.  Passalis et al. 2020, the Jeffreys divergence.
    """
    log_q_SS, log_p_SS = _log_neighbours(student_SD, kernel), _log_neighbours(teacher_SD, kernel)
    return ((log_p_SS.exp() - log_q_SS.exp()) * (log_p_SS - log_q_SS)).mean()


def _log_neighbours(samples_SD: Tensor, kernel: Kernel) -> Tensor:
    kernel_SS = kernel(samples_SD)
    return (kernel_SS / kernel_SS.sum(1, keepdim=True)).log()


class RkdObjective(SampleObjective):
    """Relational knowledge distillation: the distances and angles between responses.

    Args:
        distance: Factor on `distance_loss`.  The default is that of the paper.
        angle: Factor on `angle_loss`.  The default is that of the paper.
        pool, layers, weight: As in `SampleObjective`.
    """

    name = "rkd"
    least_rows = 3  # two samples have no angle, and their relative distance is always 1

    def __init__(
        self,
        *,
        distance: float = 25.0,
        angle: float = 50.0,
        pool: str | Pool = "mean",
        layers: Layers = LAST_LAYERS,
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(pool=pool, layers=layers, weight=weight)
        self.distance, self.angle = distance, angle

    def relate(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Return the weighted sum of both losses: ()."""
        total = self.distance * distance_loss(student_SD, teacher_SD)
        return total + self.angle * angle_loss(student_SD, teacher_SD)


class SimilarityObjective(SampleObjective):
    """Similarity-preserving distillation (SP): the Gram matrices of the responses.

    Tung and Mori give it the weight 3,000.  See `SampleObjective` for the arguments.
    """

    name = "similarity"

    def relate(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Return the mean squared difference of the similarities: ()."""
        return similarity_loss(student_SD, teacher_SD)


class PktObjective(SampleObjective):
    """Probabilistic knowledge transfer: which responses are each other's neighbours.

    Args:
        kernel: A name in `KERNELS`, a function of samples (S, D) that returns (S, S), or "both" for
            the sum of the losses with both kernels.
        pool, layers, weight: As in `SampleObjective`.
    """

    name = "pkt"

    def __init__(
        self,
        *,
        kernel: str | Kernel = "both",
        pool: str | Pool = "mean",
        layers: Layers = LAST_LAYERS,
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(pool=pool, layers=layers, weight=weight)
        self.kernel = kernel if kernel == "both" else choose("kernel", kernel, KERNELS)

    def relate(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Return the sum of the losses with each kernel: ()."""
        kernels = [self.kernel] if callable(self.kernel) else KERNELS.values()
        losses = [pkt_loss(student_SD, teacher_SD, kernel) for kernel in kernels]
        return torch.stack(losses).sum()


class FlowObjective(PktObjective):
    """One of the two terms of information-flow modelling: PKT over the inner or the last layers.

    Passalis et al. 2020.  The flow is one term over the inner pairs of a layer map, with
    a weight that fades after the critical period of training, and one term over the last pair, with
    a constant weight.  `flow` makes both.

    Args:
        part: "inner" for all pairs of layers but the last one, "last" for the last pair.
        kernel, pool, layers, weight: As in `PktObjective`.
    """

    def __init__(
        self,
        part: Literal["inner", "last"],
        *,
        kernel: str | Kernel = "both",
        pool: str | Pool = "mean",
        layers: Layers = "uniform",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, pool=pool, layers=layers, weight=weight)
        self.name = f"flow_{part}"
        self.part = part

    def pairs(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> Pairs:
        """Return the pairs of this part.  Raises ModelError if the flow has fewer than two."""
        found = super().pairs(student, teacher)
        if len(found) < 2:
            raise ModelError(
                f"flow: got the pairs of layers {list(found)}, but it needs at least two: inner "
                "ones and a last one. Add a pair, or use pkt."
            )
        return found[:-1] if self.part == "inner" else found[-1:]
