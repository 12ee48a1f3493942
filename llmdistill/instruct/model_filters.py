"""Filters that look at what another model says of a task: its embedding, or a judge's score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmdistill.errors import RecipeError
from llmdistill.instruct.filters import Filter
from llmdistill.instruct.tasks import Task


class Embeddings(Filter):
    """Drops rows whose `field` means nearly the same as that of a kept row.

    `model` is a Sentence Transformers model, by its Hub id or folder.  A row is dropped if the
    cosine of the angle between both embeddings is at least `threshold`.
    """

    def __init__(self, model: str, threshold: float = 0.9, field: str = "instruction") -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise RecipeError(
                "the filter 'embeddings' needs the sentence-transformers package. Install it with: "
                "pip install 'llmdistill[embeddings]'"
            ) from error
        self.threshold, self.field = threshold, field
        self.model = SentenceTransformer(model)
        self.kept_ones = np.empty((64, 0), np.float32)
        self.count = 0
        self._last: tuple[str, np.ndarray] = ("", np.empty(0))

    def reason(self, task: Task) -> str | None:
        nearest = self._nearest(task)
        return "same meaning" if nearest is not None and nearest >= self.threshold else None

    def columns(self, task: Task) -> Mapping[str, Any]:
        return {"nearest_meaning": self._nearest(task)}

    def kept(self, task: Task) -> None:
        found = self._embedding(task)
        if not self.count:
            self.kept_ones = np.empty((64, len(found)), np.float32)
        elif self.count == len(self.kept_ones):
            self.kept_ones = np.concatenate([self.kept_ones, np.empty_like(self.kept_ones)])
        self.kept_ones[self.count] = found
        self.count += 1

    def _nearest(self, task: Task) -> float | None:
        """Return the largest cosine to a kept row, or None for the first one."""
        if not self.count:
            return None
        return float((self.kept_ones[: self.count] @ self._embedding(task)).max())

    def _embedding(self, task: Task) -> np.ndarray:
        text = getattr(task, self.field)
        if self._last[0] != text or not len(self._last[1]):
            found = self.model.encode(text, normalize_embeddings=True, show_progress_bar=False)
            self._last = (text, np.asarray(found, np.float32))
        return self._last[1]


class Score(Filter):
    """Drops rows whose score by a judge is below `at_least` or above `at_most`.

    `aspect` is what the judge was asked for.
    """

    def __init__(
        self, aspect: str, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        self.aspect = aspect
        self.lowest = -math.inf if at_least is None else at_least
        self.highest = math.inf if at_most is None else at_most

    def reason(self, task: Task) -> str | None:
        score = task.scores.get(self.aspect)
        if score is None:
            return f"no score of {self.aspect}"
        if score < self.lowest:
            return f"{self.aspect} too low"
        return f"{self.aspect} too high" if score > self.highest else None
