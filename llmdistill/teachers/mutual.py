"""Students that teach each other (deep mutual learning).

N = predicted tokens, n = those of one block, K = models, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmdistill.batch import LossSum, Sequences, StudentView, TeacherSignal
from llmdistill.distributions import Combined, Dense, Distribution
from llmdistill.errors import RecipeError
from llmdistill.forward import read
from llmdistill.models.heads import check_split
from llmdistill.models.taps import Need
from llmdistill.models.vocabulary import num_tokens
from llmdistill.objectives.choices import choose
from llmdistill.objectives.chunked import chunked_sum
from llmdistill.objectives.divergences import DIVERGENCES, Divergence
from llmdistill.objectives.labels import cross_entropy, labelled
from llmdistill.objectives.weights import predicted_tokens
from llmdistill.teachers.base import TrainableTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "peers"


class MutualTeacher(TrainableTeacher):
    """Peers of the student, which are trained along: the student learns from their mean.

    Zhang et al. 2018 (deep mutual learning, arXiv 1706.00384).  Each peer learns from the mean of
    the probabilities of all others, the student included, and from the labels.  Its loss of a token
    is divergence(mean of the others || peer) + ce_weight * CE(label, peer).  Nothing but the
    objectives trains the student.  Peers run without dropout.  Tokens that the student wrote are no
    labels.

    Args:
        peers: Causal LMs of transformers with one vocabulary.  All their weights are trained.
        tokenizer: The tokenizer of the peers.
        divergence: A name in `divergences.DIVERGENCES`, or a function.
        temperature: Temperature of the divergence, which is multiplied by its square.
        ce_weight: Factor of the cross-entropy.

    Raises:
        RecipeError: There are no peers, or the name is unknown.
        ModelError: A peer cannot be split into backbone and head.
    """

    provides = frozenset({Need.DISTRIBUTION})
    reads_changes = True

    def __init__(
        self,
        peers: Sequence[PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        *,
        divergence: str | Divergence = "forward_kl",
        temperature: float = 1.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not peers:
            raise RecipeError("MutualTeacher: there are no peers. Give at least one.")
        for peer in peers:
            check_split(peer)
        self.peers = nn.ModuleList(peer.requires_grad_(True) for peer in peers).eval()
        self.trained_models = tuple(self.peers)
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens(tokenizer)
        self.divergence = choose("divergence", divergence, DIVERGENCES)
        self.temperature, self.ce_weight = temperature, ce_weight

    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens with the mean of the peers, with gradients to them."""
        views = [read(peer, sequences, self.num_tokens) for peer in self.peers]
        return TeacherSignal(_mean([Dense(view.hidden_NH, view.head) for view in views]))

    def forward(self, student: StudentView, signal: TeacherSignal, sequences: Sequences) -> LossSum:
        """Return the sum of the peers' losses over one micro-batch."""
        parts = _parts(signal.distribution)
        others = [part.detach() for part in parts]
        mine = Dense(student.hidden_NH, student.head)
        total = torch.zeros((), device=student.hidden_NH.device)
        for place, part in enumerate(parts):
            target = _mean([mine, *others[:place], *others[place + 1 :]])
            total = total + self._loss(part, target, sequences)
        return LossSum(total, predicted_tokens(sequences))

    def _loss(self, peer: Dense, target: Distribution, sequences: Sequences) -> Tensor:
        """Return the sum of one peer's losses: ()."""
        served, targets_N = target.serve(), sequences.targets_N
        labelled_N = labelled(sequences)

        def position_loss(peer_nV: Tensor, rows: slice) -> Tensor:
            target_nV = served[rows].to(peer_nV.device)
            divergence_n = self.divergence(peer_nV, target_nV, temperature=self.temperature)
            weighted_n = self.ce_weight * labelled_N[rows] * cross_entropy(peer_nV, targets_N[rows])
            return self.temperature**2 * divergence_n + weighted_n

        ones_N = torch.ones_like(labelled_N)
        total, _ = chunked_sum(peer.hidden_NH, peer.head, position_loss, ones_N)
        return total

    def export(self, folder: Path) -> None:
        """Write each peer and its tokenizer into `folder`/peers/1 and so on."""
        for number, peer in enumerate(self.peers, start=1):
            place = folder / FOLDER / str(number)
            peer.save_pretrained(place)  # type: ignore[operator]
            self.tokenizer.save_pretrained(place)


def _mean(parts: Sequence[Dense]) -> Distribution:
    """Return the mean of the probabilities of several distributions."""
    if len(parts) == 1:
        return parts[0]
    weights_KN = torch.full((len(parts), 1), 1 / len(parts)).expand(-1, len(parts[0]))
    return Combined(tuple(parts), weights_KN)


def _parts(distribution: Distribution | None) -> list[Dense]:
    """Return the peers' distributions that `_mean` has combined."""
    parts = distribution.parts if isinstance(distribution, Combined) else (distribution,)
    return [part for part in parts if isinstance(part, Dense)]
