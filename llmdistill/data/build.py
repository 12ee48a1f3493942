"""Loads the tokenizers of a recipe, and builds its rows: those to train on and to measure on.

N = rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmdistill import recipe
from llmdistill.data.collate import EncodedRows, PromptDataset, PromptStream
from llmdistill.data.content import content_of
from llmdistill.data.sources import read
from llmdistill.data.validate import Rules
from llmdistill.errors import RecipeError
from llmdistill.models.load import load_tokenizer
from llmdistill.models.vocabulary import require_adoptable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("llmdistill")

HELD_OUT = 2**40  # added to the ids of rows from `data.eval`: a teacher finds a row by its id


def load_student_tokenizer(whole: recipe.Recipe) -> PreTrainedTokenizerBase:
    """Load the student's tokenizer, or the teacher's if the recipe gives it to the student.

    Raises VocabularyError if the student's model was not made for the teacher's tokenizer.
    """
    student = whole.student
    name, revision = _tokenizer_source(whole)
    tokenizer = load_tokenizer(name, revision=revision)
    if student.tokenizer == "teacher":
        own = load_tokenizer(student.model, revision=student.revision)
        if new := require_adoptable(tokenizer, own):
            logger.info("%d tokens of the teacher's tokenizer are new to the student", new)
    return tokenizer


def _tokenizer_source(whole: recipe.Recipe) -> tuple[str, str | None]:
    """Return name and revision of the model whose tokenizer the student has."""
    student = whole.student
    if student.tokenizer == "own":
        return student.model, student.revision
    return whole.teacher.paired(student)[0]


def teacher_tokenizers(whole: recipe.Recipe) -> list[PreTrainedTokenizerBase]:
    """Load the tokenizers of all teachers that must render rows as the student's does."""
    against = whole.evaluate.against
    measured = () if against is None else ((against.model, against.revision),)
    named = dict.fromkeys([*whole.teacher.paired(whole.student), *measured])
    named.pop(_tokenizer_source(whole), None)
    return [load_tokenizer(name, revision=revision) for name, revision in named]


def load_data(
    whole: recipe.Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    compare: bool = True,
    warn: bool = True,
) -> tuple[EncodedRows, PromptDataset | None]:
    """Return the rows to train on, and the held-out rows (None if the recipe has none).

    Raises VocabularyError if a teacher renders a row differently; with `compare` off nothing is
    compared.  `warn` logs what the rows hold that is not read, or is read as text.
    """
    logger.info("reading %s", ", ".join(source.source for source in whole.data.train))
    needed = whole.rollout.takes_data
    train, held = build_rows(
        whole.data,
        tokenizer,
        needs_response=needed,
        seed=whole.seed,
        reads=whole.teacher.reads,
        others=teacher_tokenizers(whole) if compare else (),
    )
    if isinstance(train, PromptDataset):
        logger.info("%d rows to train on (usable: %s)", len(train), train.counts)
        for note in train.counts.notes() if warn else ():
            logger.warning("data: %s", note)
    return train, held


def build_rows(
    section: recipe.DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_response: bool,
    seed: int,
    reads: recipe.Reads | None = None,
    others: Sequence[PreTrainedTokenizerBase] = (),
) -> tuple[EncodedRows, PromptDataset | None]:
    """Return rows to train on and rows to measure on; the latter are None if the recipe has none.

    `needs_response` refuses training rows without an answer.  `seed` chooses the copies of rows in
    a weighted source.  `reads` names what the teacher reads of a row.  `others` are the tokenizers
    of teachers, which must render the rows alike.  Row ids are unique.
    Raises RecipeError or DataError if the rows cannot be used, and VocabularyError if a teacher
    renders one as other tokens.
    """
    rules = replace(_rules(section, needs_response=needs_response), others=tuple(others))
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
    if isinstance(train, PromptDataset):
        known = np.isin(held.rows.questions_N, train.rows.questions_N)
        if both := int(known.sum()):
            logger.warning("data: %d rows of data.eval have a prompt of data.train", both)
    return train, PromptDataset(held.rows.renumbered(held.rows.row_ids_N + HELD_OUT), held.counts)


def _hold_back(
    parts: Sequence[tuple[PromptDataset, float]], number: int, seed: int
) -> tuple[PromptDataset, PromptDataset]:
    """Return the rows to train on and the rows that are held back; no copy of a row is in both."""
    # Held-out rows are chosen before the copies of a weighted source are made: a second copy of one
    # would be trained on.
    once = PromptDataset.join([(part, 1.0) for part, _ in parts], seed=seed)
    rest, held = once.hold_back(min(number, len(once)))
    if not len(rest):
        raise RecipeError(
            f"data.hold_back: holding back {number} of {len(once)} rows leaves none to train on, "
            "as rows with the same prompt stay together. Set a smaller number, or use data.eval."
        )
    return PromptDataset.join(parts, seed=seed, without=held.rows.row_ids_N), held


def _load(
    sources: Sequence[recipe.SourceRecipe],
    tokenizer: PreTrainedTokenizerBase,
    rules: Rules,
) -> list[tuple[PromptDataset, float]]:
    parts = []
    for source in sources:
        rows = read(source.source, columns=source.columns, add=source.add)
        content = content_of(source.source, columns=source.columns, add=source.add)
        own = _of_source(rules, source)
        part = PromptDataset.encode(rows, tokenizer, own, content=content)
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
