"""Encodes the rows of a source.  Each row is used, dropped for a counted reason, or an error."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from llmdistill.data.formats import Example, form_of, to_examples, unread
from llmdistill.data.pairing import Pairing
from llmdistill.data.render import render, with_context
from llmdistill.data.table import Row
from llmdistill.errors import DataError
from llmdistill.models.chat import special_tokens
from llmdistill.models.vocabulary import num_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 5  # bad rows that an error names: enough to see a pattern in a large file


@dataclass
class RowCounts:
    """Counts of the rows of a source, by what happened to them.

    `more_answers` counts the additional examples that `every_turn` makes of a conversation.
    `unread` counts the rows with a field that nothing reads, by its name.  `control_texts` counts
    the rows whose text looks like control tokens, which stays text.
    """

    read: int = 0
    more_answers: int = 0
    kept: int = 0
    bad: int = 0
    long_prompts_dropped: int = 0
    long_responses_dropped: int = 0
    responses_truncated: int = 0
    long_contexts_dropped: int = 0
    excluded: int = 0
    control_texts: int = 0
    answers_left_out: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def examples(self) -> int:
        """Number of examples that were read; each is one answer."""
        return self.read + self.more_answers

    def __add__(self, other: RowCounts) -> RowCounts:
        names = [one.name for one in fields(self)]
        return RowCounts(*(getattr(self, name) + getattr(other, name) for name in names))

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
        if self.long_contexts_dropped:
            parts.append(f"{self.long_contexts_dropped} dropped: the teacher's prompt too long")
        if self.excluded:
            parts.append(f"{self.excluded} dropped: 'weight' or 'train' excludes the answer")
        if self.answers_left_out:
            parts.append(f"{self.answers_left_out} answers left out: they cannot be rendered")
        return ", ".join(parts)

    def notes(self) -> list[str]:
        """Return sentences about what the rows hold and nobody reads, or reads as text."""
        found = []
        if self.unread:
            named = ", ".join(f"'{name}' ({count} rows)" for name, count in self.unread.items())
            found.append(f"fields that nothing reads: {named}")
        if self.control_texts:
            found.append(
                f"{self.control_texts} rows have text that looks like control tokens; it is read "
                "as text. A conversation that a template has rendered already should be given as "
                "'messages'"
            )
        return found


@dataclass(frozen=True)
class Rules:
    """How rows become ids, and what happens to rows that do not fit.

    `form` is a key of `formats.FORMATS` or auto.  `needs_response` refuses rows without an answer.
    Limits are in tokens, None for no limit; `long_prompts` is drop or stop, `long_responses` is
    cut, drop or stop.  `columns` are fields of the rows that are kept for the teacher, as are
    `optional` ones, which a row may lack.  `context` is the template of the last message as the
    teacher reads it, with `{prompt}` and the names of columns in braces.  Rows whose teacher's
    prompt exceeds `max_context_tokens` are dropped.  `keeps_messages` keeps the messages of the
    prompt.  `others` are the tokenizers of the teachers, which must render the rows alike.
    """

    form: str = "auto"
    every_turn: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    needs_response: bool = False
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    long_prompts: str = "drop"
    long_responses: str = "cut"
    skip_bad: bool = False
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    context: str | None = None
    max_context_tokens: int | None = None
    keeps_messages: bool = False
    others: tuple[PreTrainedTokenizerBase, ...] = ()


def encode(
    rows: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, rules: Rules | None = None
) -> tuple[list[Row], RowCounts]:
    """Encode (place, row) pairs; without `rules`, with the defaults of `Rules`.

    Raises DataError with the number of malformed rows and the first five, unless they are skipped.
    Raises DataError too if no row is left.
    """
    # All rows are read before an error is raised, so that one run shows all that must be fixed.
    encoder = Encoder(tokenizer, rules or Rules())
    counts, bad = RowCounts(), list[DataError]()
    kept = list(encoder.rows(rows, counts, bad.append))
    require_usable(encoder.rules, counts, bad)
    return kept, counts


def require_usable(rules: Rules, counts: RowCounts, bad: Sequence[DataError]) -> None:
    """Raise DataError if malformed rows are not skipped, or if no row is left."""
    if bad and not rules.skip_bad:
        raise DataError(_summary(bad, counts.bad, counts.read))
    if not counts.kept:
        raise DataError(f"no usable rows are left: {counts}. Check the source and its limits.")


class Encoder:
    """Turns the rows of a source into ids, by the rules of a run."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> None:
        self.tokenizer, self.rules = tokenizer, rules
        self._pairing = Pairing(tokenizer, rules.others, rules.template_options)
        self._control, self._limit = special_tokens(tokenizer), num_tokens(tokenizer)

    def rows(
        self,
        rows: Iterable[tuple[str, Any]],
        counts: RowCounts,
        on_bad: Callable[[DataError], None],
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Row]:
        """Yield the encoded rows one by one.

        `counts` is updated along the way.  `on_bad` is called with the error of each malformed row.
        `share` is (rank, number of ranks): the rows are dealt out in turn, and those of other ranks
        are only counted.  Raises DataError at a row that is too long if the rules say stop, and
        VocabularyError if a teacher renders a row differently.
        """
        rules, (rank, ranks) = self.rules, share
        for number, (place, row) in enumerate(rows):
            counts.read += 1
            # The id of this row's first example: `read` has counted one for it already.
            first = counts.examples - 1
            is_own = number % ranks == rank
            try:
                examples = _examples(row, place, rules)
                counts.more_answers += max(len(examples) - 1, 0)
                if not is_own:
                    continue
                encoded = [_encode(row, one, self.tokenizer, rules) for one in examples]
                _check_ids(encoded, place, self.tokenizer, self._limit)
            except DataError as error:
                counts.bad += is_own
                if is_own:
                    on_bad(error)
                continue
            for example, one in zip(examples, encoded, strict=True):
                counts.answers_left_out += example.response is not None and one.response_ids is None
                alone = replace(example, response=None, more={})
                self._pairing.check(example if one.response_ids is not None else alone)
            _count(row, place, examples, self._control, rules, counts)
            for turn, one in enumerate(encoded):
                fitting = _fit(replace(one, row_id=first + turn), place, rules, counts)
                if fitting is not None:
                    counts.kept += 1
                    yield fitting


def _examples(row: Any, place: str, rules: Rules) -> list[Example]:
    if isinstance(row, DataError):  # a row that its source could not read
        raise row
    examples = to_examples(row, place, form=rules.form, every_turn=rules.every_turn)
    # The last example has no answer if the conversation ends with the user.
    if rules.needs_response and examples and examples[-1].response is None:
        raise DataError(
            f"{place}: the row has no response, but a fixed rollout trains on the responses of the "
            "dataset. End 'messages' with role 'assistant', or add 'completion' or 'output'."
        )
    return examples


def _encode(
    row: dict[str, Any], example: Example, tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> Row:
    if rules.keeps_messages and (
        example.tools or any(one.get("tool_calls") for one in example.prompt)
    ):
        raise DataError(
            f"{example.place}: a teacher that sees images reads no tools. Drop the row."
        )
    columns = {name: row.get(name) for name in rules.optional}
    columns |= {name: _column(row, name, example.place) for name in rules.columns}
    try:
        json.dumps(columns)
    except TypeError as error:
        raise DataError(
            f"{example.place}: a column that the teacher reads is not text, a number or a list: "
            f"{error}. Convert it, or drop the row."
        ) from None
    ids = _ids(example, tokenizer, rules)
    seen = None
    if rules.context is not None:
        informed = with_context(example, rules.context, columns)
        # An empty context is the plain prompt, to the last token.
        seen = ids[0]
        if informed != example:
            seen, _ = render(tokenizer, informed, rules.template_options)
    messages = example.prompt if rules.keeps_messages else ()
    return Row(0, *ids, columns, seen, messages, is_text=not example.prompt)


def _ids(
    example: Example, tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> tuple[list[int], list[int] | None]:
    try:
        return render(tokenizer, example, rules.template_options)
    except DataError:
        # If a model writes the answer, one that cannot be rendered is no reason to drop the prompt.
        if rules.needs_response or example.response is None or not example.prompt:
            raise
        prompt = replace(example, response=None, more={})
        return render(tokenizer, prompt, rules.template_options)


def _check_ids(rows: list[Row], place: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    """Raise DataError if a row has an id for which the model has no row."""
    for row in rows:
        highest = max([*row.prompt_ids, *(row.response_ids or ()), *(row.teacher_prompt_ids or ())])
        if highest >= limit:
            raise DataError(
                f"{place}: the row has the token {tokenizer.convert_ids_to_tokens(highest)!r} "
                f"({highest}), but the model has only {limit} tokens. Use a tokenizer that was "
                "made for the model, or drop the row."
            )


def _count(
    row: dict[str, Any],
    place: str,
    examples: list[Example],
    control: re.Pattern[str],
    rules: Rules,
    counts: RowCounts,
) -> None:
    """Count what a usable row holds that is not read, or is read as text."""
    counts.excluded += not examples
    read = {*rules.columns, *rules.optional}
    names = unread(row, form_of(row, place, rules.form))
    counts.unread.update(name for name in names if name not in read)
    messages = [one for example in examples[-1:] for one in (*example.prompt, example.answer)]
    counts.control_texts += any(control.search(one["content"] or "") for one in messages)


def _column(row: dict[str, Any], name: str, place: str) -> Any:
    """Return a field of a row that the teacher reads.  Raises DataError if it is missing."""
    if row.get(name) is None:
        raise DataError(
            f"{place}: the row has no '{name}', which the teacher reads; it has "
            f"{', '.join(map(str, row))}. Add it, map it with 'columns' of the source, or drop the "
            "row."
        )
    return row[name]


def _fit(row: Row, place: str, rules: Rules, counts: RowCounts) -> Row | None:
    """Return the row within its limits, or None if it is dropped; both are counted."""
    if _too_long(row.prompt_ids, rules.max_prompt_tokens):
        if rules.long_prompts == "stop":
            raise DataError(
                f"{place}: the prompt has {len(row.prompt_ids)} tokens, more than "
                f"data.max_prompt_tokens = {rules.max_prompt_tokens}. Raise it, or set "
                "data.long_prompts: drop."
            )
        counts.long_prompts_dropped += 1
        return None
    if row.teacher_prompt_ids and _too_long(row.teacher_prompt_ids, rules.max_context_tokens):
        counts.long_contexts_dropped += 1
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
        # The end token is cut off too, so the student does not learn to stop in the middle.
        counts.responses_truncated += 1
        return replace(row, response_ids=row.response_ids[: rules.max_response_tokens])
    return row


def _too_long(ids: list[int], limit: int | None) -> bool:
    return limit is not None and len(ids) > limit


def _summary(bad: Sequence[DataError], number: int, total: int) -> str:
    """Say what is wrong with some of the `number` malformed rows, of `total` rows."""
    lines = [
        f"{number} of {total} rows are malformed. Fix or drop them. In a recipe you can also set "
        "data.on_bad_row: skip."
    ]
    lines += [f"  {line}" for line in bad[:SHOWN]]
    if number > SHOWN:
        lines.append(f"  ... and {number - SHOWN} more")
    return "\n".join(lines)
