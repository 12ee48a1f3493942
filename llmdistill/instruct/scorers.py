"""Scorers choose the best of several answers to one prompt.

A scorer is a pure function from tasks to one score for each, where higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


SCORERS: dict[str, Callable[[Sequence[Task]], list[float]]] = {
    "likelihood": likelihood,
    "consensus": consensus,
    "reference": reference,
}


def best(tasks: Sequence[Task], by: str) -> Task:
    """Return the answer with the highest score by the scorer `by`, a key of `SCORERS`.

    Truncated answers rank below all others, empty ones below them, and the first of several equal
    answers wins.
    """
    scores = SCORERS[by](tasks)
    order = range(len(tasks))
    return tasks[
        max(order, key=lambda i: (bool(tasks[i].output), not tasks[i].truncated, scores[i], -i))
    ]
