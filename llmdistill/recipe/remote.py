"""A teacher on a server: how to reach it, and what the card of its dataset states about it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import defaults

Parameter = Literal[
    "max_tokens",
    "seed",
    "top_p",
    "top_k",
    "temperature",
    "stop",
    "logprobs",
    "chat_template_kwargs",
]
"""Parameters of a request that a server may not know."""
SAMPLING, LIMIT = "it in 'sampling' of the generator", "the generator's limit of new tokens"
OWN_KEYS = {
    "model": "'teacher.model'",
    "messages": "the prompts of the generator",
    "prompt": "the prompts of the generator",
    "temperature": SAMPLING,
    "top_p": SAMPLING,
    "top_k": SAMPLING,
    "max_tokens": LIMIT,
    "seed": "'seed' of the recipe",
    "n": "'samples' of the generator",
    "stream": "nothing: replies are read as a whole",
    "stop": "nothing: the generator ends its replies",
    "logprobs": "nothing: filters that need them ask for them",
    "chat_template_kwargs": "'chat_template_kwargs' of the recipe",
    "api_key": "'teacher.key_from'",
    "authorization": "'teacher.key_from'",
}
"""Fields of a request that the recipe sets elsewhere."""
_teacher = defaults("teachers/remote.py", "RemoteTeacher")


class RemoteTeacherRecipe(Strict):
    """A teacher on an OpenAI-compatible server, such as vLLM, SGLang, llama.cpp or a hosted API.
    Only `llmdistill generate` can use it, and it needs the extra `remote`.
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            *("url", "key_from", "concurrency", "timeout", "retries", "per_minute", "license"),
            *("leave_out", "rename"),
        }
    )
    """Keys that a resumed run can change, because the rows do not depend on them."""
    is_remote: ClassVar[bool] = True
    sees_images: ClassVar[bool] = False
    image_column: ClassVar[str | None] = None

    kind: Literal["remote"] = "remote"
    model: str
    """Name of the model on the server."""
    url: str = "http://localhost:8000/v1"
    """Base URL of the server, which usually ends with `/v1`.  Keys do not belong in it; use
    `key_from`.
    """
    tokenizer: str | None = None
    """Hub id or folder of the model's tokenizer.  The generator `magpie` needs it, because it
    continues the text of the chat template.  It is also used to recognise control tokens.
    """
    revision: str | None = None
    """Revision of the model that is noted in every row.  The server decides what it serves."""
    license: str | None = None
    """Licence of the model for the card of the dataset, such as `apache-2.0`."""
    key_from: str | None = _teacher.key_from
    """Environment variable with the API key.  The key itself is never written to a file.  `null`
    uses `OPENAI_API_KEY` for api.openai.com and no key for any other server.
    """
    concurrency: int = Field(_teacher.concurrency, gt=0)
    """Largest number of requests that run at the same time, over all processes (at least one each).
    Fewer run while the server says that there are too many.
    """
    timeout: float = Field(_teacher.timeout, gt=0)
    """Timeout of one attempt, in seconds."""
    retries: int = Field(_teacher.retries, ge=0)
    """Further attempts at a request that failed, with growing pauses.  `0` tries once.  If the
    server only says that there are too many requests, that is no failure while others get replies.
    """
    per_minute: int | None = Field(_teacher.per_minute, gt=0)
    """Largest number of requests per minute, over all processes.  With `null` only `concurrency`
    limits them.
    """

    leave_out: list[Parameter] = []
    """Parameters of a request that are not sent, because the server refuses them, such as `[seed]`.
    """
    rename: dict[Parameter, str] = {}
    """Parameters of a request that are sent under another name, such as `{max_tokens:
    max_completion_tokens}`.
    """

    extra_body: dict[str, Any] = {}
    """Fields that are sent with every request, such as `{min_p: 0.1}`.  They are shown on the card,
    so they must hold no secret.
    """

    @field_validator("extra_body")
    @classmethod
    def _fields_without_a_key_of_their_own(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name in fields:
            if name in OWN_KEYS:
                raise PydanticCustomError(
                    "extra_body",
                    "'{name}' cannot be set in 'extra_body'. Set {key}.",
                    {"name": name, "key": OWN_KEYS[name]},
                )
        return fields

    # A recipe is copied into the run folder and shown on cards, so an address with a key in it must
    # be refused when it is read.
    @model_validator(mode="after")
    def _an_address_alone(self) -> RemoteTeacherRecipe:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PydanticCustomError("url", "'url' must have the form http://host:port/v1")
        if parts.username or parts.password or parts.query:  # the message must not show them
            raise PydanticCustomError(
                "url",
                "'url' contains a user, a password or a query, but recipes are shared. Put the key "
                "into an environment variable and set 'key_from' to its name.",
            )
        return self

    @property
    def tokenizer_source(self) -> tuple[str, str | None] | None:
        """Name and revision of the tokenizer with the model's chat template, or None."""
        return (self.tokenizer, None) if self.tokenizer else None

    @property
    def stated_license(self) -> str | None:
        return self.license
