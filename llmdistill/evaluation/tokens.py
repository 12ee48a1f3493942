"""Where in a text two models differ: KL and the most likely tokens at each position, to look at.

N = predicted tokens, n = those of one block, V = vocabulary, C = CHOICES.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmdistill.evaluation.agreement import Judged, both_log_probs
from llmdistill.forward import read
from llmdistill.objectives.divergences import kl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHOICES = 3  # most likely tokens of each model
Choices = list[tuple[str, float]]


@dataclass(frozen=True)
class Position:
    """One token of a response, with KL(teacher || student) in nats where it was predicted.

    `teacher` and `student` are the most likely tokens of each model, with their probabilities.
    """

    text: str
    kl: float
    teacher: Choices
    student: Choices


@torch.no_grad()
def positions(
    student: PreTrainedModel, judged: Judged, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> list[list[Position]]:
    """Return the positions of each response of a batch.  The student keeps its mode."""
    device = next(student.parameters()).device
    seen = read(student, judged.sequences.to(device), num_tokens)

    def words(ids: Sequence[int]) -> list[str]:
        return [str(tokenizer.decode([one])) for one in ids]

    found: list[Position] = []
    targets = iter(words(judged.sequences.targets_N.tolist()))
    for student_nV, teacher_nV in both_log_probs(seen, judged.distribution):
        columns = (kl(teacher_nV, student_nV).tolist(), _top(teacher_nV), _top(student_nV))
        for value, *both in zip(*columns, strict=True):
            chosen = [list(zip(words(ids), probs, strict=True)) for ids, probs in both]
            found.append(Position(next(targets), value, *chosen))
    rest = iter(found)
    return [[next(rest) for _ in range(count)] for count in judged.sequences.num_predicted.tolist()]


def _top(log_probs_nV: Tensor) -> Iterator[tuple[list[int], list[float]]]:
    """Yield the most likely ids at each position, with their probabilities: C of each."""
    top = log_probs_nV.float().exp().topk(min(CHOICES, log_probs_nV.shape[-1]))
    return zip(top.indices.tolist(), top.values.tolist(), strict=True)
