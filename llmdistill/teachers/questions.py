"""What is sent to a server, and how much of a reply is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmdistill.sampling import PenalisedSampling, Sampling

if TYPE_CHECKING:
    from llmdistill.teachers.remote import RemoteTeacher

# A reply may have this many bytes: far more than any text of its tokens with its log-probabilities.
MOST_BYTES, BYTES_PER_TOKEN = 2**20, 1000
MOST_CHARACTERS, CHARACTERS_PER_TOKEN = 2000, 100  # and its text this many characters


@dataclass(frozen=True)
class Question:
    """A prompt with its sampling settings.

    `prompt` is the messages of a conversation, a text to continue, or the token ids of one.  The
    reply ends before the text `stop`, and is JSON of the JSON schema `schema` if there is one.
    """

    prompt: str | tuple[int, ...] | tuple[dict[str, str], ...]
    sampling: Sampling
    max_new_tokens: int
    seed: int
    stop: str = ""
    schema: str = ""

    @property
    def most_bytes(self) -> int:
        """How many bytes a reply may have."""
        return MOST_BYTES + BYTES_PER_TOKEN * self.max_new_tokens

    @property
    def most_characters(self) -> int:
        """How many characters the text of a reply may have."""
        return MOST_CHARACTERS + CHARACTERS_PER_TOKEN * self.max_new_tokens

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return isinstance(self.prompt, tuple) and isinstance(self.prompt[0], dict)


def parameters(teacher: RemoteTeacher, question: Question) -> dict[str, Any]:
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
    if question.schema:
        schema = {"name": "answer", "strict": True, "schema": json.loads(question.schema)}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(sampling, PenalisedSampling):
        options["presence_penalty"] = sampling.presence_penalty
        options["frequency_penalty"] = sampling.frequency_penalty
    if teacher.scored:
        options["logprobs"] = True if question.is_chat else 1
    options, extra = (
        {name: value for name, value in part.items() if name not in teacher.leave_out}
        for part in (options, extra)
    )
    # The client knows OpenAI's names alone, so new names go into the rest of the body.
    extra |= {new: options.pop(old) for old, new in teacher.rename.items() if old in options}
    extra |= teacher.extra_body
    return options | {"extra_body": extra or None}


async def fetch(client: Any, question: Question, options: dict[str, Any]) -> bytes:
    """Send a question, and return the body of the reply.

    Raises ValueError if the body is longer than any reply to the question can be, and
    APIConnectionError if the connection fails.
    """
    import openai

    if question.is_chat:
        chat = client.chat.completions.with_streaming_response
        request = chat.create(messages=list(question.prompt), **options)
    else:
        is_text = isinstance(question.prompt, str)
        prompt = question.prompt if is_text else list(question.prompt)
        request = client.completions.with_streaming_response.create(prompt=prompt, **options)
    body = bytearray()
    async with request as response:
        try:
            async for part in response.iter_bytes():
                body += part
                if len(body) > question.most_bytes:
                    break
        except Exception as error:  # of the HTTP library: the client does not translate it here
            raise openai.APIConnectionError(request=response.http_request) from error
    if len(body) > question.most_bytes:
        limits = f"{question.most_bytes:,} bytes for {question.max_new_tokens} tokens"
        raise ValueError(f"it has more than {limits}")
    return bytes(body)


def open_client(url: str, key: str, timeout: float) -> Any:
    """Return a client that follows no redirect and does not retry by itself."""
    import openai

    # The client fills in two headers from the environment, whatever the server is.
    names = ("OpenAI-Organization", "OpenAI-Project")
    left_out = {} if is_openai(url) else {name: openai.Omit() for name in names}
    # No retries by the client: `_attempts` also retries unusable replies, and keeps the pace.
    # No redirects: another host would get all prompts.
    return openai.AsyncOpenAI(
        base_url=url, api_key=key, timeout=timeout, max_retries=0,
        default_headers=left_out,  # type: ignore[arg-type]
        http_client=openai.DefaultAsyncHttpxClient(
            follow_redirects=False, timeout=timeout
        ),
    )  # fmt: skip


def is_openai(url: str) -> bool:
    """Whether a server is OpenAI's own."""
    return urlsplit(url).hostname == "api.openai.com"
