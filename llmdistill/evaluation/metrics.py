r"""The measures of `text.py` as `evaluate.Metric`, for users of that library.

They are computed here, so nothing is downloaded.

RepeatedNGrams().compute(predictions=[...], n=4)
RougeL().compute(predictions=[...], references=[...])
ExactMatch().compute(predictions=[...], references=[...], pattern=r"#### (-?[\d,.]+)")
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from llmdistill.evaluation.text import exact_match, repeated_ngrams, rouge_l


def _info(description: str, *columns: str) -> evaluate.MetricInfo:
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=description, features=features
    )


class RepeatedNGrams(evaluate.Metric):
    """Share of repeated n-grams in the predictions, in [0, 1]: {"repeated_ngrams": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of n-grams that occur earlier in the same text", "predictions")

    def _compute(self, predictions: Sequence[str], n: int = 4) -> dict[str, float | None]:
        return {"repeated_ngrams": repeated_ngrams(predictions, n)}


class RougeL(evaluate.Metric):
    """Mean ROUGE-L F of the predictions, in [0, 1]: {"rouge_l": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean ROUGE-L F against one reference each", "predictions", "references")

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str]
    ) -> dict[str, float | None]:
        return {"rouge_l": rouge_l(predictions, references)}


class ExactMatch(evaluate.Metric):
    """Share of predictions with the result of the reference, in [0, 1]: {"exact_match": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of answers with the reference's result", "predictions", "references")

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], pattern: str
    ) -> dict[str, float]:
        return {"exact_match": exact_match(predictions, references, pattern)}
