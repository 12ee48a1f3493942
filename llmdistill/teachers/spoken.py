"""What a server replied: a text with its thinking, or the reason why there is none."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from llmdistill.models.thinking import THINKING

REFUSED_BY_SERVER, TOOL_CALL = "refused by the server", "tool call in place of a text"
UNUSABLE_REPLY = "unusable reply"
FAILED = "failed on the server"
BY_SERVER = (REFUSED_BY_SERVER, TOOL_CALL, UNUSABLE_REPLY, FAILED)
"""Reasons for which a server gives no text.  Asked again, it may give one."""
# Finish reasons in lower case: at the limit of new tokens, and after a failure.
CUT_OFF = ("length", "max_tokens", "model_length")
FAILURES = ("abort", "aborted", "error", "cancelled", "failed")
# Parameters of a request that a server may not know.
PARAMETERS = (
    *("max_tokens", "seed", "top_p", "top_k", "temperature", "stop", "logprobs"),
    "chat_template_kwargs",
)
# Raised while reading a reply that is not JSON, or is JSON of an unexpected form.
UNUSABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


class NoLogProbs(ValueError):
    """A reply has no log-probabilities.  Asking again does not change that."""


@dataclass(frozen=True)
class Spoken:
    """A server's reply.

    `truncated`: the limit of new tokens cut it off.  `refused`: why there is no reply; empty if
    there is one.  `log_prob`: its mean log-probability in nats per token; None if not scored.
    `thinking`: what the model thought before it, if the server says so.
    """

    text: str
    truncated: bool = False
    refused: str = ""
    log_prob: float | None = None
    thinking: str = ""


def parse(body: bytes) -> Any:
    """Return a JSON document whose objects have their fields as attributes.

    Raises ValueError if it is not JSON.
    """
    return json.loads(body, object_hook=lambda fields: SimpleNamespace(**fields))


def read_reply(reply: Any, *, scored: bool) -> tuple[Spoken, Any]:
    """Return the reply, and the reason why it ended if that is not one of OpenAI's.

    Raises ValueError if the reply has an unexpected form.
    """
    # A chat's choice has a message, a completion's has a text.
    choices = getattr(reply, "choices", None)
    if not choices:
        raise ValueError("it has no choices")
    choice = choices[0]
    if not isinstance(choice, SimpleNamespace):
        raise ValueError(f"its first choice is {choice!r}")
    message = getattr(choice, "message", None)
    text = getattr(message, "content", None) if message else getattr(choice, "text", None)
    stated = (getattr(message, name, None) for name in THINKING)
    thinking = next((found for found in stated if found and isinstance(found, str)), "")
    given = getattr(choice, "finish_reason", None)
    reason = given.lower() if isinstance(given, str) else given
    if reason == "content_filter" or getattr(message, "refusal", None):
        return Spoken("", refused=REFUSED_BY_SERVER), None
    if not text and (reason == "tool_calls" or getattr(message, "tool_calls", None)):
        return Spoken("", refused=TOOL_CALL), None
    if reason in FAILURES:
        return Spoken("", refused=FAILED), None
    is_cut = reason in CUT_OFF
    text = _joined(text)
    if not isinstance(text, str):
        raise ValueError(f"its text is {str(text)[:40]!r}, its finish_reason {given!r}")
    for one in (text, thinking):
        one.encode()  # raises ValueError for a lone surrogate, which could not be saved as UTF-8
    log_prob = _mean_log_prob(choice) if scored and text else None
    spoken = Spoken(text, truncated=is_cut, log_prob=log_prob, thinking=thinking.strip())
    return spoken, None if reason in (*CUT_OFF, "stop", None, "") else given


def _joined(text: Any) -> Any:
    """Return a text that a server sends as null or as a list of parts; others as they are."""
    if text is None:  # thinking used up the limit of new tokens, for example
        return ""
    if not isinstance(text, list):
        return text
    parts = [getattr(part, "text", None) for part in text]
    return "".join(part for part in parts if isinstance(part, str))


def with_hint(refusal: str) -> str:
    """Return the beginning of a refusal, with what to change if it names a parameter."""
    return f"{refusal[:500]}{parameter_hint(refusal)}"


def parameter_hint(refusal: str) -> str:
    """Return how to change the parameter that the server names in its refusal, or ""."""
    named = [name for name in PARAMETERS if re.search(rf"\b{name}\b", refusal)]
    if not named or "context" in refusal:  # a prompt that is too long names the limit, too
        return ""
    other = "max_completion_tokens" if named[0] == "max_tokens" else "another_name"
    return (
        f" Set teacher.leave_out: [{named[0]}] to send no such parameter, or teacher.rename: "
        f"{{{named[0]}: {other}}} to send it under another name."
    )


def _mean_log_prob(choice: Any) -> float:
    """Return the mean log-probability in nats per token.

    Chats list tokens in `content`, completions in `token_logprobs`.  Raises NoLogProbs if the
    server sent neither.
    """
    found = getattr(choice, "logprobs", None)
    tokens = getattr(found, "content", None)
    each = (
        [token.logprob for token in tokens]
        if tokens is not None
        else getattr(found, "token_logprobs", None)
    )
    if each is None:
        raise NoLogProbs(
            "it has no log-probabilities, which the filter 'perplexity' and 'best_by: likelihood' "
            "need. Remove them from the recipe, or use another server."
        )
    mean = sum(each) / max(len(each), 1)
    if not math.isfinite(mean):
        raise ValueError(f"its mean log-probability is {mean}")
    return mean
