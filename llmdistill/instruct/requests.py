"""Requests of a generator to a teacher, and replies."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from llmdistill.data.formats import Message
from llmdistill.instruct.parse import Parsed
from llmdistill.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A conversation that the teacher continues.

    `turn` is the role whose text comes next: a teacher can also write what a user would say.  The
    text begins with `start` and ends before `stop`; the reply contains neither.  `images` are paths
    of the images that the teacher sees before the last message.  `schema` is the JSON schema of the
    text, or "".  `who` replies is the teacher or the judge of its answers; `judge` is the latter's
    model.
    """

    messages: tuple[Message, ...]
    sampling: Sampling
    max_new_tokens: int
    turn: Literal["assistant", "user"] = "assistant"
    start: str = ""
    stop: str = ""
    images: tuple[str, ...] = ()
    schema: str = ""
    who: Literal["teacher", "judge"] = "teacher"
    judge: str = ""


@dataclass(frozen=True)
class Reply:
    """The teacher's text.

    `truncated`: the limit of new tokens cut the text off.  `refused`: why there is no text; empty
    if there is one.  `log_prob`: the mean log-probability of the text in nats per token, or None if
    the responder does not score replies.  `thinking`: what the teacher thought before the text.
    """

    text: str
    truncated: bool = False
    refused: str = ""
    log_prob: float | None = None
    thinking: str = ""


@dataclass(frozen=True)
class Asked:
    """A request with the key of its randomness: call, stage of the call, and place in the stage.

    `known` is the recorded reply, if there is one.  A responder need not ask for it again.
    """

    call: int
    stage: int
    place: int
    request: Request
    known: Reply | None = None


# One call of a task generator, as a Python generator.  It yields several requests at once, is sent
# their replies, yields the next ones, and returns its tasks.  The same number of the call and the
# same replies must give the same tasks, because resumed runs replay recorded replies.
Call = Generator[list[Request], list[Reply], Parsed]


def user(text: str) -> tuple[Message, ...]:
    """Return a conversation that consists of one user turn."""
    return ({"role": "user", "content": text},)
