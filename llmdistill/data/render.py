"""Renders conversations as token ids.  This is the only file that knows chat templates.

Control tokens in the text of a message are encoded as ordinary text, so that only the template can
open or close a turn.  A tokenizer without a template accepts one user turn, as plain text.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdistill.data.formats import Example, Message
from llmdistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough turns to show a difference between two templates: a system prompt, an answer and a second
# question.
PROBE_MESSAGES: tuple[Message, ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another one?"},
)
PLACEHOLDER = re.compile(r"\{(\w+)\}")  # a name in the template of a context
# A stand-in for a user's text, by which the text around it is found.
WHAT_A_USER_SAYS = "what a user says"


def render(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int] | None]:
    """Return the ids of the prompt and of the answer, or None if the example has no answer.

    The prompt ends where the answer starts, with the assistant's turn open.  The answer includes
    its end token.  `template_options` are passed to the chat template, such as `enable_thinking`.
    Raises DataError if the template rejects the conversation, or renders the prompt differently
    once the answer is appended.
    """
    if not example.prompt:
        return _text(tokenizer, example)
    if tokenizer.chat_template is None:
        return _plain(tokenizer, example)
    options = dict(template_options or {})
    prompt = _template(tokenizer, example.prompt, example.place, True, options)
    if example.response is None:
        return prompt, None
    answer = {"role": "assistant", "content": example.response}
    whole = _template(tokenizer, (*example.prompt, answer), example.place, False, options)
    # When the student is used, it sees the prompt alone: training on another rendering of it would
    # teach answers to a prompt that inference never produces.
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"{example.place}: the chat template renders this prompt as different tokens once the "
            "answer is appended, for example if the answer starts with white space. Strip the "
            "answer or drop the row."
        )
    return prompt, _through_end(tokenizer, whole[len(prompt) :], example.place)


def with_context(example: Example, template: str, columns: Mapping[str, Any]) -> Example:
    """Return the prompt as a teacher reads it, with context that the student does not see.

    `{prompt}` in the template stands for the last message, and other names in braces for columns.
    If all columns are empty, the example is returned as it is.  The result has no answer.  Raises
    DataError if a column is not text, or the row has no message.
    """
    names = set(PLACEHOLDER.findall(template)) - {"prompt"}
    for name in names:
        if not isinstance(columns[name], str):
            raise DataError(
                f"{example.place}: '{name}' must be text, because the teacher reads it, got "
                f"{columns[name]!r:.40}"
            )
    if not any(columns[name].strip() for name in names):
        return example
    if not example.prompt:
        raise DataError(
            f"{example.place}: the row is plain text without a prompt, so it has no message that "
            "could get a context. Use rows with a prompt and a response."
        )
    *before, last = example.prompt
    values = {**columns, "prompt": last["content"]}
    # One pass: braces in the text of a column are text.
    content = PLACEHOLDER.sub(lambda found: values[found[1]], template)
    return Example((*before, {**last, "content": content}), None, example.place)


def open_user_turn(
    tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the ids before a user's text, so that a teacher continues with such a text (Magpie).

    Raises DataError for a tokenizer without a chat template.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"tokenizer '{tokenizer.name_or_path}' has no chat template, so it cannot open a "
            "user's turn. Use the tokenizer of an instruct model."
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": WHAT_A_USER_SAYS}], tokenize=False, **(template_options or {})
    )
    # The opening is the template's own text: its control tokens are encoded as such, and the
    # tokenizer must not add a second start token.
    opening = text.partition(WHAT_A_USER_SAYS)[0]
    return list(tokenizer(opening, add_special_tokens=False)["input_ids"])


def close_user_turn(
    tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any] | None = None
) -> str:
    """Return the text after a user's text: a special token, or else the first line that follows.

    If a template ends a user's turn with no special token, this text shows that a teacher has
    finished writing it.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": WHAT_A_USER_SAYS}],
        add_generation_prompt=True,
        tokenize=False,
        **(template_options or {}),
    )
    closing = text.partition(WHAT_A_USER_SAYS)[2].strip()
    known = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    # The longest match, because one token can be the start of another.
    special = max((t for t in known if closing.startswith(t)), key=len, default="")
    return special or closing.partition("\n")[0]


def continued(tokenizer: PreTrainedTokenizerBase, text: str, place: str) -> list[int]:
    """Return the ids of a text that continues a turn; control tokens in it are ordinary text."""
    return _tokens(tokenizer, text, place, start=False) if text else []


def same_template(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> bool:
    """Whether both tokenizers render a conversation of several turns as the same ids."""
    # The templates' sources are not compared: different sources can render the same.
    if teacher.chat_template is None or student.chat_template is None:
        return teacher.chat_template is student.chat_template
    rendered = [_template(t, PROBE_MESSAGES, "probe", True, {}) for t in (teacher, student)]
    return rendered[0] == rendered[1]


def _template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    place: str,
    open_turn: bool,
    options: dict[str, Any],
) -> list[int]:
    """Return the ids of a conversation, with the assistant's turn open if `open_turn`."""
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=open_turn,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            **options,
        )
    except Exception as error:  # a template can raise any exception, jinja2's or its own
        raise DataError(
            f"{place}: the chat template rejects this conversation: {type(error).__name__}: {error}"
        ) from error
    return list(encoded["input_ids"])


def _through_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: str) -> list[int]:
    """Return the answer up to the token that closes its turn.

    That is the tokenizer's end token or, if the template closes a turn with another token, the last
    special token.  Only the template can have written either, because control tokens in the text
    were encoded as ordinary text.
    """
    if tokenizer.eos_token_id in ids:
        return ids[: ids.index(tokenizer.eos_token_id) + 1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for last in range(len(ids) - 1, -1, -1):
        if ids[last] in special:
            return ids[: last + 1]
    raise DataError(
        f"{place}: the chat template ends the answer with no special token, so a student could not "
        "learn to stop. Use the tokenizer of an instruct model."
    )


def _plain(
    tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[list[int], list[int] | None]:
    """Return the ids of one prompt and its answer as plain text, if there is no chat template."""
    if len(example.prompt) != 1:
        raise DataError(
            f"{example.place}: the conversation has {len(example.prompt)} messages, but the "
            "tokenizer has no chat template. Use the tokenizer of an instruct model, or rows with "
            "one prompt."
        )
    prompt = _tokens(tokenizer, example.prompt[0]["content"], example.place, start=True)
    if example.response is None:
        return prompt, None
    response = _tokens(tokenizer, example.response, example.place, start=False)
    return prompt, [*response, tokenizer.eos_token_id]


def _text(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Return the ids of plain text, as a prompt of its first token and a response of the rest.

    So every token except the first is predicted, and so is the end token after the text.
    """
    ids = _tokens(tokenizer, example.response or "", example.place, start=True)
    return ids[:1], [*ids[1:], tokenizer.eos_token_id]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, place: str, *, start: bool) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer '{tokenizer.name_or_path}' has no end token, so a student could not learn "
            "to stop. Use the tokenizer of an instruct model."
        )
    try:
        return tokenizer(text, add_special_tokens=start, split_special_tokens=True)["input_ids"]
    # `tokenizers` raises TypeError for text that is not valid Unicode.
    except TypeError as error:
        raise DataError(
            f"{place}: the text cannot be tokenised, probably because it is not valid Unicode: "
            f"{error}"
        ) from error


def last_messages(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """Return the user's last message of each prompt, as text for people to read.

    If the message cannot be found, the whole prompt is returned without its special tokens.
    """
    before = after = ""
    if tokenizer.chat_template:
        # A template can reject a second turn.  Nothing that is only shown may stop a run.
        with contextlib.suppress(DataError):
            before, after = _around_a_message(tokenizer)
    found = []
    for ids in prompts:
        _, opened, message = str(tokenizer.decode(ids)).rpartition(before or "\0")
        message, closed, _ = message.rpartition(after or "\0")
        if opened and closed:
            found.append(message.strip())
        else:
            found.append(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return found


def _around_a_message(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text that the template writes before each user message, and after the last one.

    The first user message follows the start of the text, and a later one follows an answer.  Their
    common part is the opening of a user's turn.
    """
    (ids, _), (later_ids, _) = (
        render(tokenizer, Example(messages, None, "probe"))
        for messages in (PROBE_MESSAGES[1:2], PROBE_MESSAGES[1:])
    )
    first, later = str(tokenizer.decode(ids)), str(tokenizer.decode(later_ids))
    question, answer = PROBE_MESSAGES[1]["content"], PROBE_MESSAGES[2]["content"]
    last = PROBE_MESSAGES[3]["content"]
    openings = (first.partition(question)[0], later.partition(answer)[2].partition(last)[0])
    pairs = zip(*(reversed(opening) for opening in openings), strict=False)
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return "".join(a for a, _ in common)[::-1], first.partition(question)[2]
