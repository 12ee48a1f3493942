"""Measures of written answers, on plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmdistill.errors import DataError


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


def exact_match(answers: Sequence[str], references: Sequence[str], pattern: str) -> float:
    """Share of answers whose result is the reference's, in [0, 1]; `result_of` finds it.

    Raises DataError for a reference that has none.
    """
    expected = [result_of(reference, pattern) for reference in references]
    if None in expected:
        row = expected.index(None)
        raise DataError(
            f"evaluate.answer_pattern: the reference of evaluation row {row} has no match of "
            f"{pattern!r}: {references[row][-80:]!r}. Correct the pattern or the row."
        )
    found = [result_of(answer, pattern) for answer in answers]
    return sum(a == b for a, b in zip(found, expected, strict=True)) / max(len(expected), 1)


def result_of(text: str, pattern: str) -> str | None:
    r"""The result that a text states: the last match of `pattern`, by its group if it has one.

    Commas and a closing full stop are removed: `#### (-?[\d,.]+)` reads GSM8K's numbers.  None if
    nothing matches.
    """
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    found = last[1] if last.re.groups else last[0]
    return None if found is None else found.replace(",", "").strip().rstrip(".").rstrip()
