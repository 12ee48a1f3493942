"""Several teachers that are combined into one at each token.

B = rows, N = predicted tokens, n = those of one block, K = teachers, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmdistill.batch import Sequences, TeacherSignal
from llmdistill.distributions import (
    Blend,
    Combined,
    Confidence,
    Distribution,
    Several,
    geometric,
    mixture,
)
from llmdistill.errors import RecipeError, TrainingError, VocabularyError
from llmdistill.models.taps import Need
from llmdistill.models.vocabulary import VocabularyMatch, compare, num_tokens
from llmdistill.objectives.choices import choose
from llmdistill.objectives.labels import token_log_probs
from llmdistill.protocols import Teacher, reads_changes
from llmdistill.recipe.teacher_groups import wrong_ensemble

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parts = tuple[Distribution, ...]


def as_mixture(parts: Parts, weights: Tensor | Confidence) -> Distribution:
    """Return the weighted mean of the probabilities."""
    return Combined(parts, weights, mixture)


def as_geometric(parts: Parts, weights: Tensor | Confidence) -> Distribution:
    """Return the weighted geometric mean of the probabilities: the mean of the logits."""
    return Combined(parts, weights, geometric)


def as_sum(parts: Parts, weights: Tensor | Confidence) -> Distribution:
    """Return one target for each teacher, so that the loss is the weighted sum of their losses."""
    assert isinstance(weights, Tensor)  # refused when the ensemble is made
    return Several(parts, weights)


# Recipes read the names with `ast`, so the tables must stay dict literals.
MIXES: dict[str, Callable[[Parts, Tensor | Confidence], Distribution]] = {
    "mixture": as_mixture,
    "geometric": as_geometric,
    "sum": as_sum,
}
WEIGH = {
    "fixed": "the same weights for each token",
    "confidence": "softmax(-entropy / temperature) for each token",
    "likelihood": "softmax(mean log-probability of the response / temperature) for each row",
}


class EnsembleTeacher:
    """Several frozen teachers with one vocabulary, combined at each token.

    A teacher whose weight is 0 runs no forward pass.  The ensemble scores tokens and cannot write.
    A student is measured against the first teacher with the largest weight.

    Args:
        teachers: The teachers, which may be on different devices.
        mix: "mixture" for the mean of their probabilities, "geometric" for the mean of their
            logits, or "sum" for the sum of the losses against each of them.
        weigh: "fixed", "confidence" or "likelihood"; see WEIGH.
        weights: The fixed weights, which are divided by their sum.  None counts all the same.
        weight_temperature: Temperature of weights that are not fixed.

    Raises:
        RecipeError: A name is unknown, or the options do not fit together.
        VocabularyError: The teachers do not share a vocabulary.
    """

    provides = frozenset({Need.DISTRIBUTION})
    scores_anew = True

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        mix: str = "mixture",
        weigh: str = "fixed",
        weights: Sequence[float] | None = None,
        weight_temperature: float = 1.0,
    ) -> None:
        self.teachers = list(teachers)
        if wrong := wrong_ensemble(len(self.teachers), mix, weigh, weights):
            raise RecipeError(f"EnsembleTeacher: {wrong}")
        require_one_vocabulary([teacher.tokenizer for teacher in self.teachers])
        self.mix_name, self.mix = mix, choose("mix", mix, MIXES)
        self.weigh, self.weight_temperature = weigh, weight_temperature
        given = [1.0] * len(self.teachers) if weights is None else list(weights)
        self.weights = [weight / sum(given) for weight in given]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the first teacher, whose vocabulary all share."""
        return self.teachers[0].tokenizer

    @property
    def ends(self) -> frozenset[int]:
        """The token ids that end a response of one of the teachers."""
        return all_ends(self.teachers)

    @property
    def reads_changes(self) -> bool:
        """Whether all of the teachers apply changes of embeddings."""
        return all(reads_changes(teacher) for teacher in self.teachers)

    @property
    def plain(self) -> Teacher:
        """The first teacher with the largest weight."""
        return self.teachers[self.weights.index(max(self.weights))]

    @torch.no_grad()
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens with one forward pass of each teacher that has a weight."""
        if Need.DISTRIBUTION not in needs:
            return TeacherSignal()
        used = [k for k, weight in enumerate(self.weights) if weight > 0]
        parts = tuple(distribution_of(self.teachers[k], sequences) for k in used)
        if len(parts) == 1:
            return TeacherSignal(parts[0])
        fixed = [self.weights[k] for k in used]
        if self.weigh == "fixed" and self.mix_name == "geometric":
            return TeacherSignal(Blend(parts, tuple(fixed)))
        return TeacherSignal(self.mix(parts, self._weights(parts, fixed, sequences)))

    def _weights(
        self, parts: Parts, fixed: Sequence[float], sequences: Sequences
    ) -> Tensor | Confidence:
        """Return the weights of the parts at each token: (K, N), or a function of their logits."""
        if self.weigh == "confidence":
            return Confidence(self.weight_temperature)
        if self.weigh == "fixed":
            return torch.tensor(fixed)[:, None].expand(-1, len(parts[0]))
        score_KB = torch.stack([mean_log_prob(part, sequences).cpu() for part in parts])
        weight_KB = (score_KB / self.weight_temperature).softmax(0)
        return weight_KB.repeat_interleave(sequences.num_predicted.cpu(), dim=1)


def require_one_vocabulary(tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """Raise VocabularyError, which names the teachers, unless all share one vocabulary."""
    first, *others = tokenizers
    for other in others:
        found = compare(first, other, None, num_tokens(first))
        if found.match is VocabularyMatch.DIFFERENT:
            raise VocabularyError(
                f"teachers '{first.name_or_path}' and '{other.name_or_path}' do not share a "
                f"vocabulary: {found.reason}. Use teachers with the same tokenizer."
            )


def all_ends(teachers: Sequence[Teacher]) -> frozenset[int]:
    """Return the token ids that end a response of one of the teachers."""
    return frozenset().union(*(getattr(teacher, "ends", ()) for teacher in teachers))


def distribution_of(teacher: Teacher, sequences: Sequences) -> Distribution:
    """Return a teacher's distribution at the predicted tokens, by a forward pass."""
    found = teacher.judge(sequences, frozenset({Need.DISTRIBUTION})).distribution
    if found is None:
        raise TrainingError(
            f"{type(teacher).__name__}.judge returned no distribution. Return one if it is needed."
        )
    return found


def mean_log_prob(distribution: Distribution, sequences: Sequences) -> Tensor:
    """Return the mean log-probability of each row's predicted tokens, in nats: (B,).

    It is 0 for a row without predicted tokens.
    """
    each_N = token_log_probs(distribution, sequences.targets_N)
    counts_B = sequences.num_predicted.cpu()
    row_N = torch.arange(len(counts_B)).repeat_interleave(counts_B)
    sums_B = torch.zeros(len(counts_B), dtype=each_N.dtype).index_add(0, row_N, each_N)
    return sums_B / counts_B.clamp_min(1)
