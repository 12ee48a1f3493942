"""Tell what a model thought from what it answered, in a text that holds both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

THINKING = ("reasoning_content", "thinking", "reasoning")
"""Names of the field of a message that holds its thinking."""
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


class Block(NamedTuple):
    """A block of thinking and the text after it, with the tags around the thinking."""

    thinking: str
    text: str
    tags: tuple[str, str] = TAGS[0]


def thinking_block(text: str, *, may_be_open: Sequence[str] = ()) -> Block | None:
    """Return the thinking at the start of a text and what follows, or None if there is none.

    `may_be_open` are the closing tags whose opening tag may be missing, because the template has
    written it already.
    """
    for opening, closing in TAGS:
        start = text.lstrip()
        # An opening tag elsewhere belongs to a text about such tags.
        is_missing = closing in may_be_open and opening not in text
        if start.startswith(opening) or is_missing:
            inside, closed, rest = start.removeprefix(opening).partition(closing)
            if closed:
                return Block(inside.strip(), rest.lstrip("\n"), (opening, closing))
    return None


def spoken_thinking(text: str, *, is_open: bool = False) -> tuple[str, str]:
    """Return the thinking at the start of what a model wrote, and the text after it.

    `is_open` says that the template has opened the thinking, so the text starts in it.  A server
    may have done so without saying it: then a closing tag at the end of a line shows it.
    """
    # A tag within the text, such as one that an answer explains, follows its opening tag.
    closings = [
        end
        for start, end in TAGS
        if is_open or (start not in text and re.search(rf"{re.escape(end)}[ \t]*(?:\n|$)", text))
    ]
    block = thinking_block(text, may_be_open=closings)
    if block is not None:
        return block.thinking, block.text
    # Without a closing tag, the limit of new tokens has cut the thinking off.
    opening = next((start for start, _ in TAGS if text.lstrip().startswith(start)), None)
    if opening is not None:
        return text.lstrip().removeprefix(opening).strip(), ""
    return (text.strip(), "") if is_open else ("", text)
