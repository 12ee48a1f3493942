"""ROUGE-L between a text and a large pool of texts, fast and with the results of `rouge_score`.

The F-measure of ROUGE-L for lists of m and n tokens is 2 LCS / (m + n), with LCS the length of the
longest common subsequence.  This equals the normalised indel similarity.  Each token is encoded as
one character, so that `rapidfuzz` can compare a whole pool as strings, and stop with a pair as soon
as it cannot reach the threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel

from llmdistill.evaluation.words import plain_words

FIRST_CHARACTER = 0x100  # Unicode has over a million code points from here: one for each token
ROUNDING = 1e-9  # pairs this close below the threshold are computed exactly as well


class Match(NamedTuple):
    """The most similar text of a pool: its ROUGE-L F, and its index in the pool."""

    score: float
    place: int


class RougePool:
    """A pool of texts that finds the one most similar to a new text.

    Tokens are words in lower case without stemming; for ASCII text they are those of `rouge_score`.
    """

    def __init__(self) -> None:
        self._characters: dict[str, str] = {}
        self._texts: list[str] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Add a text; its index is the number of texts before it."""
        self._texts.append(self._encode(text))

    def nearest(self, text: str, above: float) -> Match | None:
        """Return the text with the highest ROUGE-L F, or None if that is not over `above`.

        The first one wins if several are equal.
        """
        encoded = self._encode(text)
        # rapidfuzz rounds differently from rouge_score, so its cutoff is a little lower, and the
        # candidates are scored again in rouge_score's way.
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

    def similar(self, text: str, count: int) -> tuple[list[Match], float | None]:
        """Return the `count` most similar texts, best first, and the mean similarity to all.

        The mean is None for an empty pool.
        """
        if not self._texts:
            return [], None
        encoded = self._encode(text)
        scores = process.cdist(
            [encoded], self._texts, scorer=Indel.normalized_similarity, dtype=np.float32
        )[0]
        # rapidfuzz counts two texts without words as equal, and rouge_score as different.
        best = np.argsort(-scores, kind="stable")[:count].tolist()
        found = [Match(_f_measure(encoded, self._texts[place]), place) for place in best]
        return found, float(scores.mean(dtype=np.float64))

    def _encode(self, text: str) -> str:
        """Return the tokens as one character each; the same token always gets the same one."""
        known = self._characters
        return "".join(
            known.setdefault(token, chr(FIRST_CHARACTER + len(known)))
            for token in plain_words(text)
        )


def rouge_l(first: str, second: str) -> float:
    """Return the ROUGE-L F of two texts, in [0, 1]."""
    pool = RougePool()
    pool.add(second)
    match = pool.nearest(first, 0.0)
    return match.score if match else 0.0


def _f_measure(first: str, second: str) -> float:
    """Return the F-measure with the operations, and so the rounding, of `rouge_score`."""
    if not first or not second:
        return 0.0
    # The indel distance is m + n - 2 LCS.
    common = (len(first) + len(second) - Indel.distance(first, second)) // 2
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall) if common else 0.0
