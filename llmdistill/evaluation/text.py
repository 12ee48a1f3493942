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
    r"""Share of answers whose result is the reference's, in [0, 1].

    The result is the last match of `pattern`, its first group where it has one, without thousands
    commas and a closing full stop: `#### (-?[\d,.]+)` is GSM8K's.  Raises DataError for a
    reference that has none.
    """
    expected = [_result(reference, pattern) for reference in references]
    if None in expected:
        row = expected.index(None)
        raise DataError(
            f"evaluate.answer_pattern: nothing in the reference of evaluation row {row} matches "
            f"{pattern!r}: {references[row][-80:]!r}"
        )
    found = [_result(answer, pattern) for answer in answers]
    return sum(a == b for a, b in zip(found, expected, strict=True)) / max(len(expected), 1)


def _result(text: str, pattern: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return (last[1] if last.re.groups else last[0]).replace(",", "").rstrip(".").strip()
