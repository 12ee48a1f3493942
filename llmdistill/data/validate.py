"""From a source to encoded rows: every row is used, dropped for a reason that is counted, or an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmdistill.data.formats import to_examples
from llmdistill.data.render import render
from llmdistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 5  # bad rows that an error names


@dataclass(frozen=True)
class Row:
    """One encoded row.  `row_id` is its place among all examples read, dropped ones too."""

    row_id: int
    prompt_ids: list[int]
    response_ids: list[int] | None


@dataclass
class RowCounts:
    """What became of the rows of a source.  A conversation may hold more answers than one."""

    read: int = 0
    more_answers: int = 0
    kept: int = 0
    bad: int = 0
    long_prompts_dropped: int = 0
    long_responses_dropped: int = 0
    responses_truncated: int = 0

    @property
    def examples(self) -> int:
        return self.read + self.more_answers

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.read} rows"]
        if self.more_answers:
            parts = [f"{self.kept} of {self.examples} answers in {self.read} rows"]
        if self.bad:
            parts.append(f"{self.bad} malformed rows skipped")
        if self.long_prompts_dropped:
            parts.append(f"{self.long_prompts_dropped} dropped: prompt too long")
        if self.long_responses_dropped:
            parts.append(f"{self.long_responses_dropped} dropped: response too long")
        if self.responses_truncated:
            parts.append(f"{self.responses_truncated} responses cut")
        return ", ".join(parts)


@dataclass(frozen=True)
class Rules:
    """How rows become ids, and what happens to those that do not fit."""

    form: str = "auto"
    every_turn: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    needs_response: bool = False
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    long_prompts: str = "drop"
    long_responses: str = "cut"
    skip_bad: bool = False


def encode(
    rows: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, rules: Rules | None = None
) -> tuple[list[Row], RowCounts]:
    """Encodes (place, row) pairs; without `rules`, as `Rules()` says.

    Raises DataError for malformed rows (their number and the first five) unless they are skipped,
    and where nothing is left.
    """
    rules = rules or Rules()
    counts = RowCounts()
    bad: list[DataError] = []
    kept = list(stream(rows, tokenizer, rules, counts, bad.append))
    if bad and not rules.skip_bad:
        raise DataError(_summary(bad, counts.read))
    if not kept:
        raise DataError(f"no usable rows are left: {counts}. Check the source and its limits.")
    return kept, counts


def stream(
    rows: Iterable[tuple[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    rules: Rules,
    counts: RowCounts,
    on_bad: Callable[[DataError], None],
) -> Iterator[Row]:
    """The encoded rows one by one; `counts` goes along, and `on_bad` gets the malformed ones."""
    for place, row in rows:
        counts.read += 1
        try:
            encoded = _encode(row, place, tokenizer, rules)
        except DataError as error:
            counts.bad += 1
            on_bad(error)
            continue
        first = counts.examples - 1
        counts.more_answers += len(encoded) - 1
        for turn, ids in enumerate(encoded):
            fitting = _fit(Row(first + turn, *ids), place, rules, counts)
            if fitting is not None:
                counts.kept += 1
                yield fitting


def _encode(
    row: Any, place: str, tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> list[tuple[list[int], list[int] | None]]:
    if isinstance(row, DataError):  # one that could not be read
        raise row
    examples = to_examples(row, place, form=rules.form, every_turn=rules.every_turn)
    if rules.needs_response and examples[-1].response is None:
        raise DataError(
            f"{place}: the row has no answer, but a fixed rollout trains on the answers of the "
            "dataset. End 'messages' with role 'assistant', or add 'completion' or 'output'."
        )
    return [render(tokenizer, example, rules.template_options) for example in examples]


def _fit(row: Row, place: str, rules: Rules, counts: RowCounts) -> Row | None:
    """The row within its bounds, or None where it is dropped."""
    if _too_long(row.prompt_ids, rules.max_prompt_tokens):
        if rules.long_prompts == "stop":
            raise DataError(
                f"{place}: the prompt has {len(row.prompt_ids)} tokens, more than "
                f"data.max_prompt_tokens = {rules.max_prompt_tokens}. Raise it, or set "
                "data.long_prompts: drop."
            )
        counts.long_prompts_dropped += 1
        return None
    if row.response_ids and _too_long(row.response_ids, rules.max_response_tokens):
        if rules.long_responses == "stop":
            raise DataError(
                f"{place}: the response has {len(row.response_ids)} tokens, more than "
                f"data.max_response_tokens = {rules.max_response_tokens}. Raise it, or set "
                "data.long_responses: cut."
            )
        if rules.long_responses == "drop":
            counts.long_responses_dropped += 1
            return None
        counts.responses_truncated += 1
        return replace(row, response_ids=row.response_ids[: rules.max_response_tokens])
    return row


def _too_long(ids: list[int], limit: int | None) -> bool:
    return limit is not None and len(ids) > limit


def _summary(bad: list[DataError], total: int) -> str:
    lines = [
        f"{len(bad)} of {total} rows are malformed. Fix or drop them, or set data.on_bad_row: skip."
    ]
    lines += [f"  {line}" for line in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  ... and {len(bad) - SHOWN} more")
    return "\n".join(lines)
