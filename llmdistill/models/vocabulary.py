"""Compare the vocabularies of two tokenizers, by what their ids mean and never by their sizes.

V = vocabulary.

Distributions can be compared token by token only if each id means the same text in both models.
Many families pad the embedding matrix with rows that no token uses.  Their number may differ, and
they are cut off before the softmax.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmdistill.errors import VocabularyError
from llmdistill.models.chat import template_ends

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class VocabularyMatch(enum.Enum):
    """Result of a comparison of two vocabularies."""

    SAME = "same vocabulary"
    PADDING_DIFFERS = "same vocabulary, padding rows differ"
    DIFFERENT = "different vocabularies"


@dataclass(frozen=True)
class VocabularyComparison:
    """Result of `compare`.

    `shared` is the number of ids that mean the same in both, or 0 if the vocabularies differ.
    `reason` is the first difference.
    """

    match: VocabularyMatch
    shared: int
    reason: str = ""


MODEL_ROWS = "model_rows"
"""Attribute of a tokenizer: the number of rows of its model's embedding, if that is known."""

# Equal vocabularies may still split a text differently (normalisation, pre-tokenizer).  This text
# has what such rules treat specially: digits, runs of spaces, a tab, accents, other scripts, code
# and a tag like a control token.
PROBE_TEXT = "The cat's 3,141 naïve  cafés\n\tdef f(x): return x**2  # привет 你好 🙂 <|end|>"


def compare(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_rows_V: int | None,
    student_rows_V: int,
) -> VocabularyComparison:
    """Compare two tokenizers, and check that the heads of their models have a row for each id.

    `teacher_rows_V` is None for a teacher without a head.  A head may have padding rows.
    """
    reason = _difference(teacher, student)
    shared = num_tokens(teacher)
    rows = [student_rows_V] if teacher_rows_V is None else [teacher_rows_V, student_rows_V]
    if not reason and shared > min(rows):
        reason = (
            f"the tokenizer has {shared} ids, but the heads have "
            f"{' and '.join(map(str, rows))} rows"
        )
    if reason:
        return VocabularyComparison(VocabularyMatch.DIFFERENT, 0, reason)
    differs = len(set(rows)) > 1
    match = VocabularyMatch.PADDING_DIFFERS if differs else VocabularyMatch.SAME
    return VocabularyComparison(match, shared)


def require_same(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_rows_V: int | None,
    student_rows_V: int,
) -> int:
    """Return the number of shared ids.  Raises VocabularyError if the vocabularies differ."""
    found = compare(teacher, student, teacher_rows_V, student_rows_V)
    if found.match is VocabularyMatch.DIFFERENT:
        teacher_head = "" if teacher_rows_V is None else f", head of {teacher_rows_V} rows"
        raise VocabularyError(
            f"teacher '{teacher.name_or_path}' ({len(teacher)} tokens{teacher_head}) and student "
            f"'{student.name_or_path}' ({len(student)} tokens, head of {student_rows_V} rows) do "
            f"not share a vocabulary: {found.reason}. Use models with the same tokenizer. If only "
            "added tokens differ, a recipe can set student.tokenizer: teacher."
        )
    return found.shared


def _difference(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str:
    """Return the first difference between two tokenizers, or ""."""
    ours, theirs = _ids(teacher), _ids(student)
    if ours != theirs:
        moved = [token for token, number in ours.items() if theirs.get(token) != number]
        missing = [token for token in theirs if token not in ours]
        token = (moved or missing)[0]
        return (
            f"{len(moved) + len(missing)} tokens differ; for example, {token!r} has the id "
            f"{ours.get(token)} in the teacher and {theirs.get(token)} in the student"
        )
    mine, yours = (t(PROBE_TEXT, add_special_tokens=False)["input_ids"] for t in (teacher, student))
    return "" if mine == yours else f"they tokenise {PROBE_TEXT[:24]!r}... differently"


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the id of each token that the model can have."""
    end = num_tokens(tokenizer)  # outside the loop: it reads the whole vocabulary
    return {token: number for token, number in tokenizer.get_vocab().items() if number < end}


def require_adoptable(adopted: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens that are new to a model which adopts another tokenizer.

    `own` is the tokenizer that the model was trained with.  Only added tokens, such as those of a
    chat template, may differ.  Raises VocabularyError if other tokens differ.
    """
    added = {*adopted.added_tokens_decoder, *own.added_tokens_decoder}
    ours, theirs = (
        {token: number for token, number in one.get_vocab().items() if number not in added}
        for one in (adopted, own)
    )
    text = PROBE_TEXT.partition("<|")[0]
    mine, yours = (t(text, add_special_tokens=False)["input_ids"] for t in (adopted, own))
    if ours != theirs or mine != yours:
        raise VocabularyError(
            f"student.tokenizer: the model of '{own.name_or_path}' was trained with another "
            f"vocabulary than that of '{adopted.name_or_path}': {_difference(adopted, own)}. "
            "Choose a student of the teacher's family."
        )
    known = own.get_vocab()
    return sum(known.get(token) != number for token, number in adopted.get_vocab().items())


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of ids of a tokenizer that its model can have.  A head may have more rows.

    `load_tokenizer` notes if the model has fewer rows than the tokenizer has ids: some tokenizers
    have a padding token that the model was never given.
    """
    # One more than the highest id, and not `len(tokenizer)`, because ids may have gaps.
    found = max(tokenizer.get_vocab().values()) + 1
    return min(found, getattr(tokenizer, MODEL_ROWS, found))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end a response.

    They are those of the tokenizer and of the generation config, and the one with which the chat
    template closes an answer: a response that is trained with it must also end there when a model
    writes it.
    """
    return listed_ends(model.generation_config, tokenizer)


def listed_ends(
    config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return the ids that end a response of a model with this generation config: see `end_ids`."""
    listed = config.eos_token_id if config else None
    configured = [listed] if isinstance(listed, int) else list(listed or [])
    found = (tokenizer.eos_token_id, *configured, *template_ends(tokenizer))
    return frozenset(i for i in found if i is not None)


def list_end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, others: Iterable[int] = ()
) -> frozenset[int]:
    """Set the end tokens of the model's generation config to `end_ids` and `others`; return them.

    Plain transformers ends a response only at the tokens in the generation config.  With all of
    them, an exported student ends its responses as it did in training.
    """
    config, ends = model.generation_config, end_ids(model, tokenizer) | set(others)
    if config is not None and ends:
        config.eos_token_id = min(ends) if len(ends) == 1 else sorted(ends)
        # Without one, `generate` warns and takes an end token for padding.
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    return ends
