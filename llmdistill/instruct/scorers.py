"""Scorers choose the best of several answers to one prompt.

A scorer is a pure function from tasks to one score for each, where higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from llmdistill.instruct.similarity import rouge_l
from llmdistill.instruct.tasks import Task


def likelihood(tasks: Sequence[Task]) -> list[float]:
    """Return the teacher's mean log-probability of each answer, in nats per token.

    An empty answer has none and gets -inf.  Raises ValueError if another one has none.
    """
    if any(task.log_prob is None and task.output for task in tasks):
        raise ValueError(
            "'likelihood' compares log-probabilities, but some answers have none. Create the "
            "responder with scored=True."
        )
    return [-math.inf if task.log_prob is None else task.log_prob for task in tasks]


def consensus(tasks: Sequence[Task]) -> list[float]:
    """Return the similarity (ROUGE-L F) of each answer to the others.

    The best answer minimises the Bayes risk (Eikema and Aziz 2020).
    """
    texts = [task.output for task in tasks]
    # The sum ranks answers as the mean would: each is compared with equally many others.
    return [
        sum(rouge_l(text, other) for j, other in enumerate(texts) if j != i)
        for i, text in enumerate(texts)
    ]


def reference(tasks: Sequence[Task]) -> list[float]:
    """Return the ROUGE-L F of each answer to its reference; 0 without a reference."""
    return [rouge_l(task.output, task.reference or "") for task in tasks]


def judge(tasks: Sequence[Task]) -> list[float]:
    """Return the judge's score of each answer; -inf if it gave none."""
    scores = (task.scores.get("quality") for task in tasks)
    return [-math.inf if score is None else score for score in scores]


SCORERS: dict[str, Callable[[Sequence[Task]], list[float]]] = {
    "likelihood": likelihood,
    "consensus": consensus,
    "reference": reference,
    "judge": judge,
}


class Ranked(NamedTuple):
    """An answer with its score, and whether it is neither empty nor truncated."""

    task: Task
    score: float
    is_whole: bool


def rank(tasks: Sequence[Task], by: str) -> list[Ranked]:
    """Return the answers from best to worst by the scorer `by`, a key of `SCORERS`.

    Truncated answers rank below all others, empty ones below them, and the first of several equal
    answers comes first.
    """
    scored = list(zip(tasks, SCORERS[by](tasks), strict=True))
    ordered = sorted(
        scored, key=lambda one: (bool(one[0].output), not one[0].truncated, one[1]), reverse=True
    )
    return [
        Ranked(task, score, bool(task.output) and not task.truncated) for task, score in ordered
    ]


def preference(ranked: Sequence[Ranked]) -> Task | None:
    """Return the best answer with the worst one as its rejected answer, or None.

    Both must be whole, differ, and have different scores.
    """
    whole = [one for one in ranked if one.is_whole and math.isfinite(one.score)]
    if len(whole) < 2 or whole[0].score == whole[-1].score:
        return None
    best, worst = whole[0], whole[-1]
    if best.task.output == worst.task.output:
        return None
    scores = {"chosen": best.score, "rejected": worst.score}
    task = best.task
    return replace(task, rejected=worst.task.output, scores={**task.scores, **scores})
