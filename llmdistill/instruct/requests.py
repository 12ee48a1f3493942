"""What a generator asks of a teacher, and what comes back."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from llmdistill.data.formats import Message
from llmdistill.instruct.parse import Parsed
from llmdistill.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A conversation to go on with.

    `turn` is whose text comes next: a teacher can be asked to write what a user would say.
    `start` is what that text begins with, `stop` what it ends before; neither comes back with the
    reply.
    """

    messages: tuple[Message, ...]
    sampling: Sampling
    max_new_tokens: int
    turn: Literal["assistant", "user"] = "assistant"
    start: str = ""
    stop: str = ""


@dataclass(frozen=True)
class Asked:
    """A request with what its randomness is keyed by: the call, its stage, the place there."""

    call: int
    stage: int
    place: int
    request: Request


@dataclass(frozen=True)
class Reply:
    """The text, and whether the limit of new tokens cut it off.

    `refused` is why there is no text: a request that was not, or could not be, answered.
    `log_prob` is the text's mean log-probability in nats per token, where it was asked for.
    """

    text: str
    truncated: bool = False
    refused: str = ""
    log_prob: float | None = None


# One call of a generator: it asks some things at once, is told, asks again, and ends with what it
# made.  The same number and the same replies give the same tasks.
Call = Generator[list[Request], list[Reply], Parsed]


def user(text: str) -> tuple[Message, ...]:
    """A conversation of one user turn."""
    return ({"role": "user", "content": text},)
