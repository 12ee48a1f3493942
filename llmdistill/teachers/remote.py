"""A teacher behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted model.

B = sequences.

It writes text, but does not provide distributions yet.  Requests run in parallel up to a limit.  A
request is retried with growing pauses if the server is busy, closes the connection, or sends an
unusable reply.  Errors that a retry cannot fix are raised.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmdistill.batch import Prompts, Sequences
from llmdistill.decoding.keyed import row_keys
from llmdistill.errors import RecipeError, TeacherError
from llmdistill.models.chat import template_ends
from llmdistill.protocols import Need
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.spoken import (
    REFUSED_BY_SERVER,
    UNUSABLE,
    UNUSABLE_REPLY,
    Spoken,
    parameter_hint,
    read_reply,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_PAUSE = 30.0  # seconds between two attempts
LONGEST_WAIT = 300.0  # seconds between two attempts if the server asks for a pause (Retry-After)
NO_KEY = "none"  # the openai client requires a key, even for servers that check none
TRY_AGAIN = (408, 409, 425, 429)  # HTTP statuses to retry, as are all from 500
# Statuses that concern the content of one request (too long, for example), so that others may
# succeed.  Such a request loses its row, and the run continues.
REFUSED_STATUS = (400, 413, 422)
HINTS = {
    401: ". Set teacher.key_from to the environment variable that holds your key.",
    403: ". Set teacher.key_from to the environment variable that holds your key.",
    404: ". Check that teacher.url has the path of the server's API (.../v1) and that the server "
    "has this model.",
}

logger = logging.getLogger("llmdistill")


@dataclass(frozen=True)
class Question:
    """A prompt with its sampling settings.

    `prompt` is the messages of a conversation, a text to continue, or the token ids of one.  The
    reply ends before the text `stop`.
    """

    prompt: str | tuple[int, ...] | tuple[dict[str, str], ...]
    sampling: Sampling
    max_new_tokens: int
    seed: int
    stop: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return isinstance(self.prompt, tuple) and isinstance(self.prompt[0], dict)


class RemoteTeacher:
    """Teacher `model` on the server at `url` (.../v1).

    The API key is read from the environment variable `key_from`.  By default, OPENAI_API_KEY goes
    to api.openai.com, and no other server gets a key.  `timeout` (of one attempt) and `pause` (the
    first one) are in seconds, `retries` are attempts after the first, and `per_minute` limits the
    requests that start.  `write` needs `tokenizer`.  With `scored`, replies have log-probabilities.
    `chat_template_kwargs` are sent to the server's chat template.  Parameters of a request in
    `leave_out` are not sent, and those in `rename` are sent under another name.
    """

    provides: frozenset[Need] = frozenset()

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        key_from: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        per_minute: float | None = None,
        pause: float = 0.5,
        scored: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        leave_out: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise RecipeError(
                "a remote teacher needs the openai package. Install it with: "
                "pip install 'llmdistill[remote]'"
            )
        self.url, self.model, self.tokenizer = url, model, tokenizer
        self.key = _key(url, key_from)
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.pause, self.scored = pause, scored
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.leave_out, self.rename = tuple(leave_out), dict(rename or {})
        self._pace = _Pace(per_minute)
        self._said: set[str] = set()
        self._is_well = False  # whether the server has given a usable reply

    def answer(
        self,
        questions: Sequence[Question],
        heard: Callable[[int, Spoken], None] = lambda place, spoken: None,
    ) -> list[Spoken]:
        """Return a reply to each question, in order; `heard` is called for each as it arrives.

        If the server refuses the content of a question, its reply has `refused` set.  Raises
        TeacherError if the server rejects the caller (a wrong key, say) or does not recover.
        """
        running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

        async def run() -> list[Spoken]:
            task = asyncio.current_task()
            assert task is not None
            running.append((asyncio.get_running_loop(), task))
            return await self._answer(questions, heard)

        # In a thread, because the caller may already run an event loop (a notebook).
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            future = thread.submit(lambda: asyncio.run(run()))
            try:
                return future.result()
            except KeyboardInterrupt:  # otherwise the thread would finish all requests
                for loop, task in running:
                    with contextlib.suppress(RuntimeError):  # the loop has just closed
                        loop.call_soon_threadsafe(task.cancel)
                raise

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """Return the server's replies to prompts of token ids, by its completions endpoint.

        Ids are sent, not text, so that no text in a prompt is read as a control token.  Replies are
        tokenised here, so their ids may differ from those that the server sampled.
        """
        if self.tokenizer is None:
            raise RecipeError(
                f"teacher '{self.model}' at {self.url} has no tokenizer, and prompts of token ids "
                "need one. Set teacher.tokenizer."
            )
        keys = (row_keys(draw, prompts.row_ids_B, Writer.TEACHER) % 2**31).tolist()
        spoken = self.answer(
            [
                Question(tuple(ids), sampling, max_new_tokens, key)
                for ids, key in zip(prompts.ids(), keys, strict=True)
            ]
        )
        if any(one.refused for one in spoken):
            raise TeacherError(f"{self.url} refused a prompt of this batch. Drop that prompt.")
        return Sequences.pack(
            prompts.ids(),
            [_ids(self.tokenizer, one)[:max_new_tokens] for one in spoken],
            prompts.row_ids_B.tolist(),
            writer=Writer.TEACHER,
            pad_id=0,
        )

    async def _answer(
        self, questions: Sequence[Question], heard: Callable[[int, Spoken], None]
    ) -> list[Spoken]:
        import openai

        # No retries by the client: `_attempts` also retries unusable replies, and keeps the pace.
        client = openai.AsyncOpenAI(
            base_url=self.url, api_key=self.key, timeout=self.timeout, max_retries=0
        )
        gate = asyncio.Semaphore(self.concurrency)

        async def one(place: int, question: Question) -> Spoken:
            async with gate:
                spoken = await self._attempts(client, question)
                heard(place, spoken)
                return spoken

        try:
            async with client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*numbered)) for numbered in enumerate(questions)]
        except ExceptionGroup as failed:  # the first error cancels the other requests
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _attempts(self, client: Any, question: Question) -> Spoken:
        """Ask until there is a reply.  Pauses double, and are at least what the server asks for."""
        import openai

        wrong, is_unusable = "", False
        for attempt in range(self.retries + 1):
            await self._pace.turn()
            wait, is_unusable = 0.0, False
            try:
                async with asyncio.timeout(self.timeout):  # the client's limits one read
                    reply = await self._ask(client, question)
                self._check_model(reply)
                found = self._spoken(reply)
                self._is_well = True
                return found
            except (
                openai.APIConnectionError,
                openai.APIResponseValidationError,
                TimeoutError,
            ) as error:
                wrong = f"{type(error).__name__}: {error}"
            except openai.APIStatusError as error:
                wrong = f"HTTP {error.status_code}: {error.message}"
                if error.status_code in REFUSED_STATUS:
                    hint = parameter_hint(wrong)
                    self._say_once(f"{self.url} refused a request: {wrong[:500]}{hint}")
                    return Spoken("", refused=REFUSED_BY_SERVER)
                if error.status_code not in TRY_AGAIN and error.status_code < 500:
                    hint = HINTS.get(error.status_code, "")
                    raise TeacherError(
                        f"{self.url} rejected the request: {wrong[:500]}{hint}"
                    ) from error
                wait = _asked_to_wait(error.response)
            except UNUSABLE as error:
                wrong = f"unusable reply: {error}"
                is_unusable = True
            self._say_once(f"{self.url}: {wrong[:200]}; retrying")
            if attempt < self.retries:
                pause = min(self.pause * 2**attempt, LONGEST_PAUSE)
                # Random, so that parallel requests do not all come back at the same moment.
                await asyncio.sleep(max(wait, pause * random.uniform(0.5, 1.0)))
        if is_unusable and self._is_well:  # others get replies, so this one costs its row alone
            return Spoken("", refused=UNUSABLE_REPLY)
        raise TeacherError(
            f"{self.url} gave no usable reply in {self.retries + 1} attempts. The last error: "
            f"{wrong[:500]} Check that the server is running and that teacher.url is right. "
            "Earlier replies are recorded: pass resume to continue."
        )

    async def _ask(self, client: Any, question: Question) -> Any:
        options, prompt = _parameters(self, question), question.prompt
        if question.is_chat:
            return await client.chat.completions.create(messages=list(prompt), **options)
        text_or_ids = prompt if isinstance(prompt, str) else list(prompt)
        return await client.completions.create(prompt=text_or_ids, **options)

    def _spoken(self, reply: Any) -> Spoken:
        spoken, reason = read_reply(reply, scored=self.scored)
        if reason is not None:
            self._say_once(f"{self.url}: finish_reason {reason!r} is taken as a complete reply")
        return spoken

    def _check_model(self, reply: Any) -> None:
        served = getattr(reply, "model", None)
        if isinstance(served, str) and served and served != self.model:
            self._say_once(f"{self.url} was asked for '{self.model}' but replies as '{served}'")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s", text)


def _parameters(teacher: RemoteTeacher, question: Question) -> dict[str, Any]:
    """Return the parameters of a request as the server takes them."""
    sampling = question.sampling
    # Extensions of OpenAI's API that vLLM and others have: sent only if they are set.
    extra: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
    if question.is_chat and teacher.chat_template_kwargs:
        extra["chat_template_kwargs"] = teacher.chat_template_kwargs
    options: dict[str, Any] = {
        "model": teacher.model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": question.max_new_tokens,
        "seed": question.seed,
    }
    if question.stop:
        options["stop"] = [question.stop]
    if teacher.scored:
        options["logprobs"] = True if question.is_chat else 1
    options, extra = (
        {name: value for name, value in part.items() if name not in teacher.leave_out}
        for part in (options, extra)
    )
    # The client knows OpenAI's names alone, so new names go into the rest of the body.
    extra |= {new: options.pop(old) for old, new in teacher.rename.items() if old in options}
    return options | {"extra_body": extra or None}


def _ids(tokenizer: PreTrainedTokenizerBase, spoken: Spoken) -> list[int]:
    """Return the token ids of a reply, with the end token unless it was cut off."""
    # Control tokens in the text of a reply stay ordinary text.
    ids = tokenizer(spoken.text, add_special_tokens=False, split_special_tokens=True)
    ends = sorted(template_ends(tokenizer)) or [tokenizer.eos_token_id]
    return ids["input_ids"] + ([] if spoken.truncated else ends[:1])


def _key(url: str, key_from: str | None) -> str:
    """Return the API key, or `NO_KEY`; a key is never sent to a server that it is not meant for.

    Raises RecipeError if the variable `key_from` is not set.
    """
    if key_from is None:
        is_openai = urlsplit(url).hostname == "api.openai.com"
        return (is_openai and os.environ.get("OPENAI_API_KEY")) or NO_KEY
    if not os.environ.get(key_from):
        raise RecipeError(
            f"teacher.key_from: the environment variable {key_from} is not set. Set it to the "
            "server's API key."
        )
    return os.environ[key_from]


class _Pace:
    """Spaces the starts of requests evenly, so that at most `per_minute` begin in a minute."""

    def __init__(self, per_minute: float | None) -> None:
        self.step = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0

    async def turn(self) -> None:
        if self.step:
            now = time.monotonic()
            # The next start is reserved before the sleep: other requests run this in between.
            self.next = max(self.next, now) + self.step
            await asyncio.sleep(self.next - self.step - now)


def _asked_to_wait(response: Any) -> float:
    """Return the seconds of the server's Retry-After header (a number or a date), or 0."""
    asked = response.headers.get("retry-after") or "0"
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        except ValueError:
            seconds = 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)
