"""How alike two texts are: ROUGE-L against a large pool, fast and to the last digit.

ROUGE-L's F-measure of two token lists is 2 LCS / (m + n), which is the normalised indel similarity.
Every token is written as one character, so that `rapidfuzz` compares whole pools as strings and
gives up on a pair as soon as it cannot reach the threshold.
"""

from __future__ import annotations

from typing import NamedTuple

from rapidfuzz import process
from rapidfuzz.distance import Indel
from rouge_score import tokenize

FIRST_CHARACTER = 0x100  # one each for up to a million different tokens
ROUNDING = 1e-9


class Match(NamedTuple):
    """The most similar text of a pool: ROUGE-L F, and its place there."""

    score: float
    place: int


class RougePool:
    """Texts, and the one among them that a new text is most like.

    Tokens are `rouge_score`'s: lower case, letters and digits of ASCII, no stemming.
    """

    def __init__(self) -> None:
        self._characters: dict[str, str] = {}
        self._texts: list[str] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        self._texts.append(self._encode(text))

    def nearest(self, text: str, above: float) -> Match | None:
        """The text with the highest ROUGE-L F, where that is more than `above`; else None."""
        encoded = self._encode(text)
        found = process.extract(
            encoded,
            self._texts,
            scorer=Indel.normalized_similarity,
            processor=None,
            score_cutoff=max(above - ROUNDING, 0.0),
            limit=None,
        )
        scores = [Match(_f_measure(encoded, other), place) for other, _, place in found]
        best = max(scores, key=lambda match: (match.score, -match.place), default=None)
        return best if best is not None and best.score > above else None

    def _encode(self, text: str) -> str:
        known = self._characters
        return "".join(
            known.setdefault(token, chr(FIRST_CHARACTER + len(known)))
            for token in tokenize.tokenize(text, None)
        )


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F of two texts."""
    pool = RougePool()
    pool.add(second)
    match = pool.nearest(first, 0.0)
    return match.score if match else 0.0


def _f_measure(first: str, second: str) -> float:
    """As `rouge_score` rounds it."""
    if not first or not second:
        return 0.0
    common = (len(first) + len(second) - Indel.distance(first, second)) // 2
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall) if common else 0.0
