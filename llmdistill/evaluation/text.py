"""Measures of written answers, on plain text."""

from __future__ import annotations

from collections.abc import Sequence


def repeated_ngrams(answers: Sequence[str], n: int = 4) -> float:
    """Share of n-grams (of words) that stood earlier in the same answer, over all answers, in [0,
    1].
    """
    total = repeated = 0
    for answer in answers:
        words = answer.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / max(total, 1)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F of each answer against its reference, in [0, 1].  Lin 2004; no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(answers, references, strict=True))
    scores = [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    return sum(scores) / max(len(scores), 1)
