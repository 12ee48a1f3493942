"""Builds the rows of a recipe: those to train on and those to measure on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmdistill import recipe
from llmdistill.data.collate import EncodedRows, PromptDataset, PromptStream
from llmdistill.data.sources import read
from llmdistill.data.validate import Rules
from llmdistill.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HELD_OUT = 2**40  # added to the ids of rows from `data.eval`: a teacher finds a row by its id


def build_rows(
    section: recipe.DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_response: bool,
    seed: int,
    reads: recipe.Reads | None = None,
) -> tuple[EncodedRows, PromptDataset | None]:
    """Return rows to train on and rows to measure on; the latter are None if the recipe has none.

    `needs_response` refuses training rows without an answer.  `seed` chooses the copies of rows in
    a weighted source.  `reads` names what the teacher reads of a row.  Row ids are unique.
    Raises RecipeError or DataError if the rows cannot be used.
    """
    rules = _rules(section, needs_response=needs_response)
    if reads is not None:
        rules = replace(rules, **reads._asdict())
    if section.streaming:
        train: EncodedRows = _stream(section.train, tokenizer, rules)
    else:
        parts = _load(section.train, tokenizer, rules)
        if section.hold_back:
            return _hold_back(parts, section.hold_back, seed)
        train = PromptDataset.join(parts, seed=seed)
    if not section.eval:
        return train, None
    # Only figures that compare with references need answers here; the teacher writes its own.
    parts = _load(section.eval, tokenizer, replace(rules, needs_response=False))
    held = PromptDataset.join(parts, seed=seed)
    return train, PromptDataset(
        [replace(row, row_id=HELD_OUT + row.row_id) for row in held.rows], held.counts
    )


def _hold_back(
    parts: Sequence[tuple[PromptDataset, float]], number: int, seed: int
) -> tuple[PromptDataset, PromptDataset]:
    """Return the rows to train on and the rows that are held back; no copy of a row is in both."""
    # Held-out rows are chosen before the copies of a weighted source are made: a second copy of one
    # would be trained on.
    once = PromptDataset.join([(part, 1.0) for part, _ in parts], seed=seed)
    if number >= len(once):
        raise RecipeError(
            f"data.hold_back: holding back {number} of {len(once)} rows leaves none to train on. "
            "Set a smaller number, or use data.eval."
        )
    _, held = once.hold_back(number)
    without = frozenset(row.row_id for row in held.rows)
    return PromptDataset.join(parts, seed=seed, without=without), held


def _load(
    sources: Sequence[recipe.SourceRecipe],
    tokenizer: PreTrainedTokenizerBase,
    rules: Rules,
) -> list[tuple[PromptDataset, float]]:
    parts = []
    for source in sources:
        rows = read(source.source, columns=source.columns, add=source.add)
        part = PromptDataset.encode(rows, tokenizer, _of_source(rules, source))
        parts.append((part, source.weight))
    return parts


def _stream(
    sources: Sequence[recipe.SourceRecipe], tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> PromptStream:
    # One PromptStream has one set of rules, so it cannot switch formats between sources.
    if len({_of_source(rules, source).form for source in sources}) > 1:
        raise RecipeError(
            "data.train: all sources of a stream must have the same format. Set the same 'format' "
            "for each of them, or set data.streaming: false."
        )

    def rows() -> Iterator[tuple[str, Any]]:
        for source in sources:
            yield from read(source.source, columns=source.columns, add=source.add, streaming=True)

    return PromptStream(rows, tokenizer, _of_source(rules, sources[0]))


def _of_source(rules: Rules, source: recipe.SourceRecipe) -> Rules:
    """Return the rules for one source, with its own format if it sets one."""
    return rules if source.format == "auto" else replace(rules, form=source.format)


def _rules(section: recipe.DataRecipe, *, needs_response: bool) -> Rules:
    return Rules(
        form=section.format,
        every_turn=section.turns == "all",
        template_options=section.chat_template_kwargs,
        needs_response=needs_response,
        max_prompt_tokens=section.max_prompt_tokens,
        max_response_tokens=section.max_response_tokens,
        long_prompts=section.long_prompts,
        long_responses=section.long_responses,
        skip_bad=section.on_bad_row == "skip",
    )
