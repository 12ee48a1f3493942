"""A teacher behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted model.

B = sequences.

It writes text, but does not provide distributions yet.  Requests run in parallel, as many as the
server takes (`pacing.py`).  A request is retried with growing pauses if the server fails, closes
the connection, or sends an unusable reply.  Errors that a retry cannot fix are raised.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import logging
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdistill.batch import Prompts, Sequences
from llmdistill.decoding.keyed import row_keys
from llmdistill.errors import RecipeError, TeacherError
from llmdistill.models.chat import template_ends
from llmdistill.protocols import Need
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.failures import (
    REFUSED_STATUS,
    TOO_MANY,
    check_status,
    why_unreached,
)
from llmdistill.teachers.pacing import LONGEST_PAUSE, Pace, asked_to_wait
from llmdistill.teachers.questions import (
    Question,
    fetch,
    is_openai,
    open_client,
    parameters,
)
from llmdistill.teachers.spoken import (
    REFUSED_BY_SERVER,
    UNUSABLE,
    UNUSABLE_REPLY,
    NoLogProbs,
    Spoken,
    parse,
    read_reply,
    with_hint,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_KEY = "none"  # the openai client requires a key, even for servers that check none
logger = logging.getLogger("llmdistill")


class RemoteTeacher:
    """Teacher `model` on the server at `url` (.../v1).

    The API key is read from the environment variable `key_from`.  By default, OPENAI_API_KEY goes
    to api.openai.com, and no other server gets a key.  `timeout` (of one attempt) and `pause` (the
    first one) are in seconds, `retries` are attempts after the first, and `concurrency` and
    `per_minute` limit the requests that run and that start.  `write` needs `tokenizer`.  With
    `scored`, replies have log-probabilities.  `chat_template_kwargs` are sent to the server's chat
    template.  Parameters of a request in `leave_out` are not sent, and those in `rename` are sent
    under another name.  The fields of `extra_body` are sent with each request.
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
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise RecipeError(
                "a remote teacher needs the openai package. Install it with: "
                "pip install 'llmdistill[remote]'"
            )
        self.url, self.model, self.tokenizer = url, model, tokenizer
        self.key = _key(url, key_from)
        self.timeout, self.retries = timeout, retries
        self.pause, self.scored = pause, scored
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.leave_out, self.rename = tuple(leave_out), dict(rename or {})
        self.extra_body = dict(extra_body or {})
        self._pace = Pace(concurrency, per_minute)
        self._said: set[str] = set()
        self._is_well = False  # whether the server has given a usable reply
        self._unusable = ""  # what was wrong with a reply that cost its row
        self._num_unusable = 0  # number of unusable replies, retried ones included

    def answer(
        self,
        questions: Sequence[Question],
        heard: Callable[[int, Spoken], None] = lambda place, spoken: None,
    ) -> list[Spoken]:
        """Return a reply to each question, in order; `heard` is called for each as it arrives.

        If the server refuses the content of a question, its reply has `refused` set.  Raises
        TeacherError if the server rejects the caller (a wrong key, say) or does not recover.
        """
        return _in_thread(lambda: self._answer(questions, heard))

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
        async def one(place: int, question: Question) -> Spoken:
            spoken = await self._attempts(client, question)
            heard(place, spoken)
            return spoken

        self._pace.open()
        try:
            async with (
                open_client(self.url, self.key, self.timeout) as client,
                asyncio.TaskGroup() as group,
            ):
                tasks = [group.create_task(one(*numbered)) for numbered in enumerate(questions)]
        except ExceptionGroup as failed:  # the first error cancels the other requests
            raise failed.exceptions[0] from None
        if self._unusable and not self._is_well:
            raise self._gave_up(self._unusable)
        return [task.result() for task in tasks]

    async def _attempts(self, client: Any, question: Question) -> Spoken:
        """Ask until there is a reply.  Pauses double, and are at least what the server asks for."""
        import openai

        wrong, is_unusable, is_too_many = "", False, False
        failures, answered = 0, self._pace.answered
        while failures <= self.retries:
            if failures and not is_too_many:
                pause = min(self.pause * 2 ** (failures - 1), LONGEST_PAUSE)
                # Random, so that parallel requests do not all come back at the same moment.
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            started = await self._pace.start()
            is_unusable = is_too_many = False
            try:
                async with asyncio.timeout(self.timeout):  # the client's limits one read
                    found = await self._ask(client, question)
                self._is_well = True
                self._pace.hear()
                return found
            except (openai.APIConnectionError, TimeoutError) as error:
                wrong = why_unreached(self.url, error, is_well=self._is_well)
            except openai.APIStatusError as error:
                wrong = f"HTTP {error.status_code}: {error.message}"
                if error.status_code in REFUSED_STATUS:
                    self._say_once(f"{self.url} refused a request: {with_hint(wrong)}")
                    return Spoken("", refused=REFUSED_BY_SERVER)
                check_status(self.url, error, wrong)
                is_too_many = error.status_code == TOO_MANY
                wait = asked_to_wait(error.response.headers)
                self._pace.obey(started, wait, self.pause, is_too_many=is_too_many)
            except UNUSABLE as error:
                wrong = f"unusable reply: {error}"
                is_unusable = True
                self._num_unusable += 1
                if self._is_hopeless(error):
                    break
            finally:
                self._pace.end()
            self._say_once(f"{self.url}: {wrong[:200]}; retrying")
            # A server that only asks for patience has not failed as long as others get replies.
            failures += not is_too_many or self._pace.answered == answered
            answered = self._pace.answered
        if not is_unusable:
            raise self._gave_up(wrong)
        self._unusable = wrong  # it costs this row alone, if others get replies
        return Spoken("", refused=UNUSABLE_REPLY)

    def _is_hopeless(self, error: Exception) -> bool:
        """Whether asking again cannot help: the server has sent nothing else so often."""
        is_odd = not self._is_well and self._num_unusable > self.retries
        return is_odd or isinstance(error, NoLogProbs)

    def _gave_up(self, wrong: str) -> TeacherError:
        said = wrong[:500].rstrip(". ")
        return TeacherError(
            f"{self.url} gave no usable reply in {self.retries + 1} attempts. The last error: "
            f"{said}. Check that the server is running and that teacher.url is right. "
            "Earlier replies are recorded: pass resume to continue."
        )

    async def _ask(self, client: Any, question: Question) -> Spoken:
        reply = parse(await fetch(client, question, parameters(self, question)))
        served = getattr(reply, "model", None)
        if isinstance(served, str) and served and served != self.model:
            self._say_once(f"{self.url} was asked for '{self.model}' but replies as '{served}'")
        spoken, reason = read_reply(reply, scored=self.scored)
        if reason is not None:
            self._say_once(f"{self.url}: finish_reason {reason!r} is taken as a complete reply")
        if len(spoken.text) > question.most_characters:
            size, tokens = len(spoken.text), question.max_new_tokens
            raise ValueError(f"it has {size:,} characters for {tokens} tokens")
        return spoken

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s", text)


def _in_thread(make: Callable[[], Coroutine[Any, Any, list[Spoken]]]) -> list[Spoken]:
    """Run a coroutine in another thread, because the caller may run an event loop (a notebook)."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def run() -> list[Spoken]:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await make()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(lambda: asyncio.run(run()))
        try:
            return future.result()
        except KeyboardInterrupt:  # otherwise the thread would finish all requests
            for loop, task in running:
                with contextlib.suppress(RuntimeError):  # the loop has just closed
                    loop.call_soon_threadsafe(task.cancel)
            raise


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
        return (is_openai(url) and os.environ.get("OPENAI_API_KEY")) or NO_KEY
    if not os.environ.get(key_from):
        raise RecipeError(
            f"teacher.key_from: the environment variable {key_from} is not set. Set it to the "
            "server's API key."
        )
    return os.environ[key_from]
