"""Renders examples as token ids: a prompt, and the answer that is trained after it.

`models/chat.py` knows the chat templates.  A tokenizer without a template accepts one user turn, as
plain text.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdistill.data.formats import Example, Message
from llmdistill.errors import DataError
from llmdistill.models.chat import ChatTemplate, end_in
from llmdistill.models.thinking import TAGS, THINKING, thinking_block

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough turns to find the text around a message: an answer and a second question.
PROBE_MESSAGES: tuple[Message, ...] = (
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
    Raises DataError if the template rejects the conversation, renders the prompt differently once
    the answer is appended, or leaves out what the answer says.
    """
    if not example.prompt:
        return _text(tokenizer, example)
    if tokenizer.chat_template is None:
        return _plain(tokenizer, example)
    chat = ChatTemplate(tokenizer, template_options, example.place)
    opened = chat.text(example.prompt, opens=True, tools=example.tools)
    prompt = chat.ids(opened)
    if example.response is None:
        return prompt, None
    answer, text = _after(chat, opened, example)
    # When the student is used, it sees the prompt alone, so the prompt keeps the ids that it has
    # alone, even if the tokenizer would join its end and the start of the answer to one token.
    whole = chat.ids(opened + answer)
    is_joined = whole[: len(prompt)] != prompt
    ids = chat.ids_after(answer) if is_joined else whole[len(prompt) :]
    closing = chat.ids_after(answer.rpartition(text)[2]) if text and text in answer else []
    return prompt, _through_end(tokenizer, ids, example.place, closing)


def _after(chat: ChatTemplate, opened: str, example: Example) -> tuple[str, str]:
    """Return the text that the template writes after the open turn, the answer and its end, and
    the part of the answer after its thinking.
    """
    opens_with = next((tags for tags in TAGS if opened.rstrip().endswith(tags[0])), None)
    thinking, message = _without_thinking(example.answer, chat.closing_tags, example.place)
    text = chat.marked(message["content"] or "").strip()
    for variant in _variants(chat, opened, example.answer, thinking, message):
        whole = _conversation(chat, example, variant)
        if whole.startswith(opened) and _says_all(chat, whole, opened, thinking, message):
            return whole[len(opened) :], text
    # The template opens the thinking, or an empty block, in the turn that it opens, but writes none
    # into a message.
    closed = chat.text(example.prompt, opens=False, tools=example.tools)
    shuts = next((tags for tags in TAGS if opened.rstrip().endswith(tags[1])), None)
    tags = opens_with or shuts
    if tags and opened.startswith(closed) and not (shuts and thinking):
        turn = opened[len(closed) :].partition(tags[0])[0]
        whole = _conversation(chat, example, message)
        if whole.startswith(closed + turn):
            rest = whole[len(closed + turn) :].lstrip("\n")
            inside = chat.marked(thinking or "").strip("\n")
            answer = rest if shuts else f"{inside}\n{tags[1]}\n\n{rest}"
            if _says_all(chat, opened + answer, opened, thinking, message):
                return answer, text
    what = "the thinking of the answer, or a part of it," if thinking is not None else "the answer"
    raise DataError(
        f"{example.place}: the chat template of '{chat.tokenizer.name_or_path}' leaves out {what} "
        "or renders this prompt differently once the answer is appended, so a student would learn "
        "something else than the row says. Use a tokenizer with another template or other "
        "data.chat_template_kwargs (such as enable_thinking), or drop the row."
    )


def _says_all(
    chat: ChatTemplate, whole: str, opened: str, thinking: str | None, message: Message
) -> bool:
    """Whether a rendered answer has the thinking with its tags, and the text after it."""
    answer = whole[len(opened) :]
    inside, text = (chat.marked(part or "").strip() for part in (thinking, message["content"]))
    if thinking is None:  # a template may change a text, but not lose it
        at_risk = message.get("tool_calls") or any(end in text for _, end in TAGS)
        return not at_risk or text in answer
    if inside not in answer or text not in answer:
        return False
    place = answer.index(inside)
    for start, end in TAGS:
        is_closed = end in answer[:place] or opened.rstrip().endswith(end)
        is_half = end in answer and start not in opened[-len(start) - 2 :] + answer[:place]
        if is_closed or is_half:
            return False
    return True


def _conversation(chat: ChatTemplate, example: Example, answer: Message) -> str:
    messages = (*example.prompt, answer)
    return chat.text(messages, opens=False, tools=example.tools)


def _without_thinking(
    answer: Message, may_be_open: Sequence[str], place: str
) -> tuple[str | None, Message]:
    """Return the thinking of an answer, or None, and the message without it.

    Raises DataError for thinking that is not closed, or that is stated twice and differs.
    """
    rest = {key: value for key, value in answer.items() if key not in THINKING}
    stated = next((answer[name] for name in THINKING if (answer.get(name) or "").strip()), None)
    text = answer["content"] or ""
    block = thinking_block(text, may_be_open=() if stated else may_be_open)
    if block is None and text.lstrip().startswith(tuple(start for start, _ in TAGS)):
        raise DataError(
            f"{place}: the thinking of the answer is not closed, so it was cut off. Drop the row."
        )
    if block is not None and stated is not None and block.thinking != stated.strip():
        raise DataError(
            f"{place}: the answer states its thinking in its text and in a field, and they differ. "
            "Keep one of them."
        )
    if block is None:
        return stated, rest
    if not block.text.strip() and not answer.get("tool_calls"):
        raise DataError(f"{place}: the answer is empty: all of it is thinking. Drop the row.")
    return block.thinking or None, rest | {"content": block.text}


def _variants(
    chat: ChatTemplate, opened: str, answer: Message, thinking: str | None, message: Message
) -> list[Message]:
    """Return the ways to state an answer, in the order in which a template is given them.

    The field is first, because it leaves the tags to the template.  The row's own text comes before
    a text with tags that are added here.
    """
    if thinking is None:
        # A block without thinking is a part of the answer, unless the prompt has closed one.
        closed = opened.rstrip().endswith(tuple(end for _, end in TAGS))
        return [message if closed else answer, message | {THINKING[0]: ""}]
    opening, closing = chat.tags
    text = message["content"] or ""
    tagged = f"{opening}\n{thinking.strip(chr(10))}\n{closing}\n\n{text}"
    own = (answer["content"] or "").lstrip().startswith(opening) and text != answer["content"]
    stated = any(answer.get(name) for name in THINKING)
    texts = [answer] if own and not stated else []
    return [message | {THINKING[0]: thinking}, *texts, message | {"content": tagged}]


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
    return Example((*before, {**last, "content": content}), None, example.place, {}, example.tools)


def open_user_turn(
    tokenizer: PreTrainedTokenizerBase,
    template_options: Mapping[str, Any] | None = None,
    before: Sequence[Message] = (),
) -> list[int]:
    """Return the ids before a user's text, so that a teacher continues with such a text (Magpie).

    `before` are the messages before that turn.  Raises DataError for a tokenizer without a chat
    template, or if the template rejects the messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"tokenizer '{tokenizer.name_or_path}' has no chat template, so it cannot open a "
            "user's turn. Use the tokenizer of an instruct model."
        )
    chat = ChatTemplate(tokenizer, template_options, "the opening of a user's turn")
    messages = (*before, {"role": "user", "content": WHAT_A_USER_SAYS})
    return chat.ids(chat.text(messages, opens=False).rpartition(WHAT_A_USER_SAYS)[0])


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


def _through_end(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], place: str, after: Sequence[int]
) -> list[int]:
    """Return the answer up to the token that closes its turn.

    `after` are the last ids, which follow the answer's text.
    """
    last = end_in(tokenizer, ids, after)
    if last is None:
        raise DataError(
            f"{place}: the chat template ends the answer with no special token, so a student could "
            "not learn to stop. Use the tokenizer of another instruct model, or a rollout that "
            "writes the answers."
        )
    return ids[: last + 1]


def _plain(
    tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[list[int], list[int] | None]:
    """Return the ids of one prompt and its answer as plain text, if there is no chat template."""
    if len(example.prompt) != 1 or example.tools or example.more.get("tool_calls"):
        what = f"has {len(example.prompt)} messages"
        if len(example.prompt) == 1:
            what = "uses tools"
        raise DataError(
            f"{example.place}: the conversation {what}, but the tokenizer has no chat template. "
            "Use the tokenizer of an instruct model (for a base model as student, set "
            "student.tokenizer: teacher), or rows with one prompt."
        )
    prompt = _tokens(tokenizer, example.prompt[0]["content"], example.place, start=True)
    if example.response is None:
        return prompt, None
    thinking, message = _without_thinking(example.answer, (), example.place)
    text = message["content"]
    if thinking is not None:
        opening, closing = TAGS[0]
        text = f"{opening}\n{thinking.strip(chr(10))}\n{closing}\n\n{text}"
    response = _tokens(tokenizer, text, example.place, start=False)
    return prompt, [*response, tokenizer.eos_token_id]


def _text(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Return the ids of plain text, as a prompt of its first token and a response of the rest.

    So every token except the first is predicted, and so is the end token after the text.
    """
    ids = _tokens(tokenizer, example.response or "", example.place, start=True)
    return ids[:1], [*ids[1:], tokenizer.eos_token_id]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, place: str, *, start: bool) -> list[int]:
    """Return the ids of plain text, after the tokens that start a text if `start`."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer '{tokenizer.name_or_path}' has no end token, so a student could not learn "
            "to stop. Use the tokenizer of an instruct model."
        )
    try:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # `tokenizers` raises TypeError for text that is not valid Unicode.
    except TypeError as error:
        raise DataError(
            f"{place}: the text cannot be tokenised, probably because it is not valid Unicode: "
            f"{error}"
        ) from error
    return [*_start_ids(tokenizer, len(tokenizer)), *ids] if start else list(ids)


@functools.lru_cache(maxsize=64)
def _start_ids(tokenizer: PreTrainedTokenizerBase, _size: int) -> tuple[int, ...]:
    """Return the ids that the tokenizer writes before a text.

    Some tokenizers also write an end token after it.  A prompt must not have one, and plain text
    gets one anyway.
    """
    alone, whole = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
    places = range(len(whole) - len(alone) + 1)
    return tuple(next((whole[:i] for i in places if whole[i : i + len(alone)] == alone), ()))


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
        for messages in (PROBE_MESSAGES[:1], PROBE_MESSAGES)
    )
    first, later = str(tokenizer.decode(ids)), str(tokenizer.decode(later_ids))
    question, answer, last = (message["content"] for message in PROBE_MESSAGES)
    openings = (first.partition(question)[0], later.partition(answer)[2].partition(last)[0])
    pairs = zip(*(reversed(opening) for opening in openings), strict=False)
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return "".join(a for a, _ in common)[::-1], first.partition(question)[2]
