"""Where in a text two models differ: KL and the most likely tokens at each position, to look at.

N = predicted tokens, n = those of one block, V = vocabulary, C = CHOICES.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
Top = tuple[list[int], list[float]]  # ids and probabilities


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
    figures: list[tuple[float, Top, Top]] = []
    for student_nV, teacher_nV in both_log_probs(seen, judged.distribution):
        columns = (kl(teacher_nV, student_nV).tolist(), _top(teacher_nV), _top(student_nV))
        figures += zip(*columns, strict=True)
    rest, found = iter(figures), []
    for ids in judged.sequences.responses():
        found.append([_position(tokenizer, ids, place, next(rest)) for place in range(len(ids))])
    return found


def _position(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    place: int,
    figures: tuple[float, Top, Top],
) -> Position:
    """Return the position of a token in a response, with what was found there."""
    value, *both = figures
    word = partial(_word, tokenizer, ids[max(place - 1, 0) : place])
    teacher, student = (list(zip(map(word, top), shares, strict=True)) for top, shares in both)
    return Position(word(ids[place]), value, teacher, student)


def _word(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> str:
    """Return the text that a token adds to those before it, with its space.

    Some tokenizers write the space of a token only behind another one.
    """
    text = str(tokenizer.decode(list(before))) if before else ""
    both = str(tokenizer.decode([*before, token]))
    return both[len(text) :] if both.startswith(text) else str(tokenizer.decode([token]))


def _top(log_probs_nV: Tensor) -> Iterator[Top]:
    """Yield the most likely ids at each position, with their probabilities: C of each."""
    top = log_probs_nV.float().exp().topk(min(CHOICES, log_probs_nV.shape[-1]))
    return zip(top.indices.tolist(), top.values.tolist(), strict=True)
