"""From a source to encoded rows: every row is used, dropped for a reason that is counted, or an
error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmdistill.data.formats import to_example
from llmdistill.data.render import render
from llmdistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 5  # bad rows that an error names


@dataclass(frozen=True)
class Row:
    """One encoded row.  `row_id` is its place in the source, whatever was dropped before it."""

    row_id: int
    prompt_ids: list[int]
    response_ids: list[int] | None


@dataclass
class Counts:
    """What became of the rows of a source."""

    read: int = 0
    kept: int = 0
    bad: int = 0
    long_prompts_dropped: int = 0
    responses_truncated: int = 0

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.read} rows"]
        if self.bad:
            parts.append(f"{self.bad} malformed rows skipped")
        if self.long_prompts_dropped:
            parts.append(f"{self.long_prompts_dropped} dropped: prompt too long")
        if self.responses_truncated:
            parts.append(f"{self.responses_truncated} responses cut")
        return ", ".join(parts)


def encode(
    rows: Iterable[tuple[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    form: str = "auto",
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    needs_response: bool = False,
    skip_bad: bool = False,
) -> tuple[list[Row], Counts]:
    """Encodes (place, row) pairs.  A longer prompt drops its row; a longer response is cut, end
    token and all.

    Raises DataError for malformed rows (their number and the first five) unless `skip_bad`, and
    where nothing is left.
    """
    kept: list[Row] = []
    counts = Counts()
    bad: list[str] = []
    for number, (place, row) in enumerate(rows):
        counts.read += 1
        try:
            prompt_ids, response_ids = _encode(row, place, tokenizer, form, needs_response)
        except DataError as error:
            bad.append(str(error))
            continue
        if max_prompt_tokens is not None and len(prompt_ids) > max_prompt_tokens:
            counts.long_prompts_dropped += 1
            continue
        if (
            response_ids
            and max_response_tokens is not None
            and len(response_ids) > max_response_tokens
        ):
            counts.responses_truncated += 1
            response_ids = response_ids[:max_response_tokens]
        kept.append(Row(number, prompt_ids, response_ids))
    counts.kept, counts.bad = len(kept), len(bad)
    if bad and not skip_bad:
        raise DataError(_summary(bad, counts.read))
    if not kept:
        raise DataError(f"no rows left to use: {counts}")
    return kept, counts


def _encode(
    row: Any, place: str, tokenizer: PreTrainedTokenizerBase, form: str, needs_response: bool
) -> tuple[list[int], list[int] | None]:
    if isinstance(row, DataError):  # a line that was not JSON
        raise row
    example = to_example(row, place, form=form)
    if needs_response and example.response is None:
        raise DataError(
            f"{place}: no answer in the row ('messages' must end with role 'assistant'; or give "
            "'completion' or 'output'); a fixed rollout trains on the data set's own answers"
        )
    return render(tokenizer, example)


def _summary(bad: list[str], total: int) -> str:
    lines = [
        f"{len(bad)} of {total} rows are malformed. Mend or drop them, or set data.on_bad_row: "
        f"skip."
    ]
    lines += [f"  {line}" for line in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  ... and {len(bad) - SHOWN} more")
    return "\n".join(lines)
