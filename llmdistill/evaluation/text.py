"""Measures of answers as plain text: repetition, ROUGE-L, and results that match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from llmdistill.errors import DataError
from llmdistill.evaluation.words import plain_words, words

CURRENCIES = "$€£¥"


def repeated_ngrams(answers: Sequence[str], n: int = 4) -> float | None:
    """Return the share of word n-grams that occur earlier in the same answer, in [0, 1].

    The share is taken over the n-grams of all answers together; it is None if there are none.
    """
    total = repeated = 0
    for answer in answers:
        parts = words(answer)
        grams = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else None


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """Return the mean ROUGE-L F of each answer against its reference, in [0, 1].

    Lin 2004, without stemming.  References without a word are left out; the mean is None if no
    reference has one.  Raises ValueError if the lists differ in length.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = list(zip(answers, references, strict=True))
    scores = [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in pairs
        if plain_words(reference)
    ]
    return sum(scores) / len(scores) if scores else None


class _Words:
    """The tokenizer of ROUGE, for texts in any language."""

    def tokenize(self, text: str) -> list[str]:
        return plain_words(text)


def exact_match(answers: Sequence[str], references: Sequence[str], pattern: str) -> float:
    """Return the share of answers whose result equals that of their reference, in [0, 1].

    `result_of` finds the results.  Raises DataError for a reference without a result.
    """
    expected = [result_of(reference, pattern) for reference in references]
    if None in expected:
        row = expected.index(None)
        # The end of the reference is shown, because results are usually there.
        raise DataError(
            f"evaluate.answer_pattern: the reference of evaluation row {row} has no match of "
            f"{pattern!r}: {references[row][-80:]!r}. Correct the pattern or the row."
        )
    found = [result_of(answer, pattern) for answer in answers]
    same = map(same_result, found, expected)
    return sum(same) / max(len(expected), 1)


def result_of(text: str, pattern: str) -> str | None:
    r"""Return the result that a text states: the last match of `pattern`, or its group.

    Commas and a closing full stop are removed, so `#### (-?[\d,.]+)` reads the numbers of GSM8K.
    Signs of a currency are left out of the text, unless the pattern has one.  Returns None if there
    is no match.
    """
    # The last match, because an answer often computes other numbers on the way to its result.
    if not re.search(r"\\\$|\[[^\]]*\$|[€£¥]", pattern):  # it does not ask for such a sign
        text = "".join(sign for sign in text if sign not in CURRENCIES)
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    found = last[1] if last.re.groups else last[0]
    # A group can be None although the pattern matched: `x|(y)`.
    return None if found is None else found.replace(",", "").strip().rstrip(".").rstrip()


def same_result(one: str | None, other: str | None) -> bool:
    """Whether two results are equal, as numbers if both are: "$18.00" is 18.

    None, for a text without a result, equals nothing.
    """
    if one is None or other is None:
        return False
    numbers = [_number(result) for result in (one, other)]
    return one == other if None in numbers else numbers[0] == numbers[1]


def _number(result: str) -> Decimal | None:
    plain = result.strip(CURRENCIES + " ")
    return Decimal(plain) if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", plain) else None
