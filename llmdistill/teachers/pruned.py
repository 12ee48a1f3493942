"""A teacher whose distribution is blended with that of a pruned copy of itself (R2KD)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from llmdistill.batch import Sequences, TeacherSignal
from llmdistill.distributions import Blend
from llmdistill.models.pruned import pruned, thresholds
from llmdistill.models.taps import Need
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PrunedTeacher(LocalTeacher):
    """A frozen model that scores tokens twice: as it is, and without its smallest weights.

    The logits of its distribution are (1 - pruned_weight) z + pruned_weight z_pruned.  Kim et al.
    2023 (R2KD).  Inner states, and the responses that it writes, are those of the model as
    it is.  No copy of the model is made.

    Args:
        model: A causal LM of transformers that is not quantised, and in one place.
        tokenizer: The tokenizer of the model, with the student's vocabulary.
        share: Share of the weights of each matrix in the decoder layers that count as 0, the
            smallest ones.
        pruned_weight: Factor on the logits without these weights, 0 to 1.

    Raises:
        ModelError: The weights are quantised or not in one place.
    """

    # What it has read while writing is the model as it is, which is only a part of the signal.
    scores_anew = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        share: float = 0.1,
        pruned_weight: float = 0.3,
    ) -> None:
        super().__init__(model, tokenizer)
        self.pruned_weight = pruned_weight
        self.limits = thresholds(model, share)

    @classmethod
    def of(cls, teacher: LocalTeacher, *, share: float, pruned_weight: float) -> Self:
        """Return the pruned teacher of a teacher that is loaded."""
        return cls(teacher.model, teacher.tokenizer, share=share, pruned_weight=pruned_weight)

    @property
    def plain(self) -> LocalTeacher:
        """The model as it is, against which a student is measured."""
        return LocalTeacher(self.model, self.tokenizer)

    @torch.no_grad()
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens with two forward passes, or one if no logits are needed."""
        whole = super().judge(sequences, needs)
        if whole.distribution is None:
            return whole
        with pruned(self.limits):
            cut = super().judge(sequences, frozenset({Need.DISTRIBUTION}))
        assert cut.distribution is not None
        weights = (1 - self.pruned_weight, self.pruned_weight)
        return TeacherSignal(Blend((whole.distribution, cut.distribution), weights), whole.states)
