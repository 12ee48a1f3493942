"""Exits of the student after some of its layers, which learn from its own last layer (BYOT).

N = predicted tokens, n = those of one block, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.distributions import Dense, ServedLogits
from llmdistill.errors import ModelError, RecipeError
from llmdistill.models.carve import keep_layers
from llmdistill.models.heads import final_norm, unwrap_adapters
from llmdistill.models.taps import Need
from llmdistill.objectives.base import Objective
from llmdistill.objectives.choices import choose
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.labels import cross_entropy, labelled
from llmdistill.objectives.states import projected, wide
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

QUARTERS = "quarters"


class Residual(nn.Module):
    """A small MLP whose output is added to its input; it starts as the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, hidden_size // 2)
        self.down = nn.Linear(hidden_size // 2, hidden_size)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, state_NH: Tensor) -> Tensor:
        return state_NH + self.down(nn.functional.silu(self.up(state_NH)))


# Recipes read the names with `ast`, so the table must stay a dict literal.
ADAPTORS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": Residual,
    "norm": lambda hidden_size: nn.Identity(),
}


class ExitsObjective(Objective):
    """Exits after some of the student's layers, each with the loss

        (1 - alpha) CE(label, exit) + alpha T^2 KL(last layer || exit) + state_weight |F - F_last|^2

    of a token, where F are the states before the head, divided by their length.  Zhang et al. 2019
    (BYOT, arXiv 1905.08094), for language models: an exit is a norm and an adaptor before the
    student's own head.  The norm starts as the student's last one.  The loss is the mean over the
    exits.  It trains the exits and the layers below them.  It has no gradient to the last layer's
    states and to the head, which learn from the other objectives.  Tokens that the student wrote
    are no labels.

    Args:
        layers: Layers after which there is an exit, counted from 1, or "quarters" for the layers at
            a quarter, a half and three quarters of the depth.
        alpha: Share of the divergence, 0 to 1.
        temperature: Temperature T of the divergence.
        state_weight: Factor on the distance of the states.
        adaptor: A name in ADAPTORS: "mlp", or "norm" for no more than the norm.
        export: The exit that becomes the exported student; None for the whole student.
        weight: Factor on the objective's mean: a number, or a schedule over the run.
        projector_learning_rate: Learning rate of the exits.  None is that of the student.

    Raises:
        RecipeError: The adaptor is unknown, or the exit to export cannot be exported.
    """

    name = "exits"
    student_needs = frozenset({Need.DISTRIBUTION, Need.HIDDEN})
    reaches_the_head = False

    def __init__(
        self,
        *,
        layers: str | Sequence[int] = "quarters",
        alpha: float = 0.5,
        temperature: float = 2.0,
        state_weight: float = 0.01,
        adaptor: str = "mlp",
        export: int | None = None,
        weight: float | Schedule = 1.0,
        projector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(weight=weight, projector_learning_rate=projector_learning_rate)
        self.layers, self.alpha, self.temperature = layers, alpha, temperature
        self.state_weight, self.export = state_weight, export
        self.adaptor = choose("adaptor", adaptor, ADAPTORS)
        listed = () if isinstance(layers, str) else layers
        if export is not None and (adaptor != "norm" or export not in listed):
            raise RecipeError(
                f"export={export} needs adaptor='norm', and must be one of the layers that are "
                "listed."
            )

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers, and create the exits.  Raises ModelError for an unknown layer."""
        depth = student.num_hidden_layers
        self.depths = exit_layers(self.layers, depth)
        self.needs = [Need.HIDDEN.after(layer) for layer in self.depths]
        self.student_needs = frozenset({Need.DISTRIBUTION, *self.needs})
        size = student.hidden_size
        self.norms = nn.ModuleList(nn.RMSNorm(size) for _ in self.depths)
        self.adaptors = nn.ModuleList(self.adaptor(size) for _ in self.depths)

    def start_from(self, student: PreTrainedModel) -> None:
        """Start each exit's norm as a copy of the student's last norm."""
        if self.export is not None:
            _require_whole(student)
        norm = final_norm(student)
        self.norms = nn.ModuleList(copy.deepcopy(norm).requires_grad_(True) for _ in self.depths)

    def forward(
        self, student: StudentView, signal: TeacherSignal | None, sequences: Sequences
    ) -> LossSum:
        """Return the mean of the exits' losses, summed over one micro-batch."""
        last = Dense(student.hidden_NH, student.head).detach()
        served = last.serve()
        total = torch.zeros((), device=student.hidden_NH.device)
        for need, norm, adaptor in zip(self.needs, self.norms, self.adaptors, strict=True):
            with torch.autocast(total.device.type, enabled=False):
                state_NH = projected(adaptor, projected(norm, wide(student.states[need])))
            total = total + self._loss(state_NH, last, served, sequences)
        return LossSum(total / len(self.needs), predicted_tokens(sequences))

    def _loss(
        self, state_NH: Tensor, last: Dense, served: ServedLogits, sequences: Sequences
    ) -> Tensor:
        """Return the sum of one exit's losses: ()."""
        targets_N = sequences.targets_N
        labelled_N = labelled(sequences)

        def position_loss(exit_nV: Tensor, rows: slice) -> Tensor:
            kl_n = forward_kl(exit_nV, served[rows], temperature=self.temperature)
            label_n = labelled_N[rows] * cross_entropy(exit_nV, targets_N[rows])
            return self.alpha * self.temperature**2 * kl_n + (1 - self.alpha) * label_n

        ones_N = torch.ones_like(labelled_N)
        total, _ = chunked_sum(state_NH, last.head, position_loss, ones_N)
        units = [nn.functional.normalize(wide(one), dim=-1) for one in (state_NH, last.hidden_NH)]
        return total + self.state_weight * (units[0] - units[1]).square().sum()

    def exported(self, student: PreTrainedModel) -> PreTrainedModel | None:
        """Return the student that is exported: its layers up to an exit, or None for all of it.

        Raises ModelError for a student with an adapter.
        """
        if self.export is None:
            return None
        _require_whole(student)
        small = keep_layers(student, range(self.export))
        norm = self.norms[self.depths.index(self.export)]
        final_norm(small).load_state_dict(norm.state_dict())
        return small


def _require_whole(student: PreTrainedModel) -> None:
    """Raise ModelError for a student with an adapter."""
    if unwrap_adapters(student) is not student:
        raise ModelError(
            "an exit of a student with an adapter cannot be exported. Train all weights, or set "
            "export to None."
        )


def exit_layers(layers: str | Sequence[int], depth: int) -> list[int]:
    """Return the layers after which there is an exit, for a student of `depth` layers.

    Raises ModelError for a layer that does not exist, or if there is none.
    """
    if isinstance(layers, str):
        found = sorted({math.ceil(depth * part / 4) for part in (1, 2, 3)} - {depth})
    else:
        found = sorted(set(layers))
    if not found or found[0] < 1 or found[-1] > depth:
        raise ModelError(
            f"exits after layers {found} do not fit a student of {depth} layers. List layers from "
            f"1 to {depth}."
        )
    return found
