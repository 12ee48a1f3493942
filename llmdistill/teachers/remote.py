"""A teacher behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted model.

It writes; it is not asked for distributions yet.  Requests run side by side up to a limit, and are
made again with growing pauses where the server was busy, broke off, or said nothing that can be
used.  What cannot be mended by asking again ends with an error.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmdistill.batch import Draw, Need, Prompts, Sampling, Sequences, Writer
from llmdistill.decoding.keyed import row_keys
from llmdistill.errors import RecipeError, TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_PAUSE = 30.0  # seconds between two attempts
NO_KEY = "none"  # the client insists on one; servers of one's own do not


@dataclass(frozen=True)
class Question:
    """Messages of a conversation, or the plain text that the answer goes on from."""

    prompt: str | tuple[dict[str, str], ...]
    sampling: Sampling
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Spoken:
    """An answer, and whether the limit of new tokens cut it off."""

    text: str
    truncated: bool


class RemoteTeacher:
    """`model` on the server at `url` (.../v1).  The key is read from the environment variable
    `key_from`.

    `retries` are further attempts at each request; `per_minute` bounds how many are begun.
    `tokenizer` is needed to write for a rollout, where prompts come as ids.
    """

    provides: frozenset[Need] = frozenset()

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        key_from: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        per_minute: int | None = None,
        pause: float = 0.5,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise RecipeError(
                "a remote teacher needs the openai client: pip install 'llmdistill[remote]'"
            )
        self.url, self.model, self.tokenizer = url, model, tokenizer
        self.key = os.environ.get(key_from) or NO_KEY
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.per_minute, self.pause = per_minute, pause

    def answer(self, questions: Sequence[Question]) -> list[Spoken]:
        """An answer to each, in their order.

        Raises TeacherError where the server refuses a request or does not recover; nothing is given
        then.
        """
        with concurrent.futures.ThreadPoolExecutor(1) as thread:  # the caller may run a loop
            return thread.submit(asyncio.run, self._answer(questions)).result()

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """The server's answers to prompts of ids, by its completions endpoint.

        The text is tokenised again: its ids may differ from those that the server drew.
        """
        if self.tokenizer is None:
            raise RecipeError(
                f"teacher '{self.model}' at {self.url} has no tokenizer: give teacher.tokenizer"
            )
        keys = (row_keys(draw, prompts.row_ids_B, Writer.TEACHER) % 2**31).tolist()
        texts = [self.tokenizer.decode(ids) for ids in prompts.ids()]
        spoken = self.answer(
            [
                Question(text, sampling, max_new_tokens, key)
                for text, key in zip(texts, keys, strict=True)
            ]
        )
        return Sequences.pack(
            prompts.ids(),
            [self._ids(one)[:max_new_tokens] for one in spoken],
            prompts.row_ids_B.tolist(),
            writer=Writer.TEACHER,
            pad_id=0,
        )

    def _ids(self, spoken: Spoken) -> list[int]:
        assert self.tokenizer is not None
        ids = self.tokenizer(spoken.text, add_special_tokens=False, split_special_tokens=True)
        return ids["input_ids"] + ([] if spoken.truncated else [self.tokenizer.eos_token_id])

    async def _answer(self, questions: Sequence[Question]) -> list[Spoken]:
        import openai

        client = openai.AsyncOpenAI(
            base_url=self.url, api_key=self.key, timeout=self.timeout, max_retries=0
        )
        gate, pace = asyncio.Semaphore(self.concurrency), _Pace(self.per_minute)

        async def one(question: Question) -> Spoken:
            async with gate:
                return await self._attempts(client, question, pace)

        try:
            async with client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(question)) for question in questions]
        except ExceptionGroup as failed:  # the first one stops the others
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _attempts(self, client: Any, question: Question, pace: _Pace) -> Spoken:
        """Asks until there is an answer; the pauses double, or are as long as the server says."""
        import openai

        wrong = ""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(min(self.pause * 2 ** (attempt - 1), LONGEST_PAUSE))
            await pace.turn()
            try:
                return _spoken(await self._ask(client, question))
            except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
                wrong = f"{type(error).__name__}: {error}"
            except openai.APIStatusError as error:
                wrong = f"HTTP {error.status_code}: {error.message}"
                if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                    raise TeacherError(f"{self.url} refuses: {wrong[:500]}") from error
                await asyncio.sleep(_asked_to_wait(error.response))
            except ValueError as error:  # JSON that is none among them
                wrong = f"unusable reply: {error}"
        raise TeacherError(
            f"{self.url} gave no usable reply in {self.retries + 1} attempts; the last: "
            f"{wrong[:500]}. What was recorded is kept: go on with --resume once it is well."
        )

    async def _ask(self, client: Any, question: Question) -> Any:
        sampling = question.sampling
        options: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": question.max_new_tokens,
            "seed": question.seed,
        }
        if sampling.top_k:
            options["extra_body"] = {"top_k": sampling.top_k}
        if isinstance(question.prompt, str):
            return await client.completions.create(prompt=question.prompt, **options)
        return await client.chat.completions.create(messages=list(question.prompt), **options)


class _Pace:
    """Lets requests begin evenly, so many a minute."""

    def __init__(self, per_minute: int | None) -> None:
        self.step = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0

    async def turn(self) -> None:
        if self.step:
            now = asyncio.get_running_loop().time()
            self.next = max(self.next, now) + self.step
            await asyncio.sleep(self.next - self.step - now)


def _spoken(reply: Any) -> Spoken:
    """The text of a reply; ValueError for one that is empty, broken off, or not of this form."""
    choices = getattr(reply, "choices", None)
    if not choices:
        raise ValueError("it holds no choice")
    message = getattr(choices[0], "message", None)
    text = getattr(message, "content", None) if message else getattr(choices[0], "text", None)
    reason = getattr(choices[0], "finish_reason", None)
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise ValueError(f"text {str(text)[:40]!r}, finish_reason {reason!r}")
    text.encode()  # half a character of two: ValueError
    return Spoken(text, truncated=reason == "length")


def _asked_to_wait(response: Any) -> float:
    """The server's Retry-After in seconds, where it gives one."""
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), LONGEST_PAUSE)
    except ValueError:
        return 0.0
