"""Measures what a student lost in training, against the model that it started from.

The starting student's own greedy responses are the text: where training changed what the model
would write, its distributions differ there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmdistill.batch import Prompts
from llmdistill.evaluation.agreement import agreement, judge, perplexity
from llmdistill.evaluation.batches import PromptBatches
from llmdistill.models.heads import eval_mode
from llmdistill.models.vocabulary import num_tokens
from llmdistill.sampling import GREEDY, Draw
from llmdistill.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Forgetting:
    """How far a student is from the model that it started from.

    `kl_start_text` is KL(start || student) per token on the start's greedy responses, in nats.
    `perplexity_before` is the start's perplexity on the responses of the rows, and
    `perplexity_after` the student's; both are None for rows without responses.
    """

    kl_start_text: float
    perplexity_before: float | None
    perplexity_after: float | None


class StartingStudent:
    """The student before training, with which students are compared on one set of prompts.

    The constructor writes and scores the responses of the start, which takes a while.
    """

    def __init__(self, start: LocalTeacher, prompts: Prompts, *, max_new_tokens: int) -> None:
        self.shared = num_tokens(start.tokenizer)
        batches = PromptBatches(prompts, max_new_tokens)
        written = [
            start.write(some, GREEDY, max_new_tokens=max_new_tokens, draw=Draw(0))
            for some in batches
        ]
        # Without the scores from writing, which round differently: the start has exactly 0.
        self._judged = judge(start, [replace(some, signal=None) for some in written])
        self._given = batches.given() if prompts.responses else []
        with start.in_use() as model:
            self._before = self._perplexity(model)

    def compare(self, student: PreTrainedModel) -> Forgetting:
        """Return how far a student is from the start."""
        with eval_mode(student):
            kl = agreement(student, self._judged, self.shared).forward_kl
            return Forgetting(kl, self._before, self._perplexity(student))

    def _perplexity(self, model: PreTrainedModel) -> float | None:
        return perplexity(model, self._given, self.shared) if self._given else None
