"""Which of several answers to one prompt is kept.  A scorer is a pure function: tasks in, a score
for each, higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmdistill.instruct.similarity import rouge_l
from llmdistill.instruct.tasks import Task


def likelihood(tasks: Sequence[Task]) -> list[float]:
    """The teacher's own mean log-probability, in nats per token."""
    if any(task.log_prob is None for task in tasks):
        raise ValueError(
            "'likelihood' compares log-probabilities, but some answers have none. Create the "
            "responder with scored=True."
        )
    return [task.log_prob or 0.0 for task in tasks]


def consensus(tasks: Sequence[Task]) -> list[float]:
    """Mean ROUGE-L to the other answers: minimum Bayes risk (Eikema and Aziz 2020)."""
    texts = [task.output for task in tasks]
    return [
        sum(rouge_l(text, other) for j, other in enumerate(texts) if j != i)
        for i, text in enumerate(texts)
    ]


def reference(tasks: Sequence[Task]) -> list[float]:
    """ROUGE-L to the answer that was there; 0 where there was none."""
    return [rouge_l(task.output, task.reference or "") for task in tasks]


SCORERS: dict[str, Callable[[Sequence[Task]], list[float]]] = {
    "likelihood": likelihood,
    "consensus": consensus,
    "reference": reference,
}


def best(tasks: Sequence[Task], by: str) -> Task:
    """The answer with the highest score, the first of several; one that was cut off comes last."""
    scores = SCORERS[by](tasks)
    order = range(len(tasks))
    return tasks[max(order, key=lambda i: (not tasks[i].truncated, scores[i], -i))]
