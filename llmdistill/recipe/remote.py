"""A teacher on a server: how it is reached, and what its data set says of it."""

from __future__ import annotations

from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.base import Strict
from llmdistill.recipe.tables import defaults

_teacher = defaults("teachers/remote.py", "RemoteTeacher")


class RemoteTeacherRecipe(Strict):
    """A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted one)."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {"url", "key_from", "concurrency", "timeout", "retries", "per_minute", "license"}
    )
    """Keys that a resumed run may change: how the server is reached, and what is stated."""
    is_remote: ClassVar[bool] = True

    kind: Literal["remote"] = "remote"
    model: str
    """Its name on the server."""
    url: str = "http://localhost:8000/v1"
    tokenizer: str | None = None
    """A Hub id or a folder; needed if the prompt is not a chat (magpie)."""
    revision: str | None = None
    """Noted in every row; the server decides what it serves."""
    license: str | None = None
    """The model's licence as the data set's card states it: apache-2.0."""
    key_from: str | None = _teacher.key_from
    """The environment variable that holds the key; the key itself is never written.  None:
    OPENAI_API_KEY for api.openai.com, and no key for any other server.
    """
    concurrency: int = Field(_teacher.concurrency, gt=0)
    timeout: float = Field(_teacher.timeout, gt=0)
    """Seconds for one attempt."""
    retries: int = Field(_teacher.retries, ge=0)
    per_minute: int | None = Field(_teacher.per_minute, gt=0)
    """Requests begun per minute, by all ranks; None: as many as `concurrency` lets through."""

    @model_validator(mode="after")
    def _an_address_alone(self) -> RemoteTeacherRecipe:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PydanticCustomError("url", "'url' must have the form http://host:port/v1")
        if parts.username or parts.password or parts.query:  # and the message must not repeat it
            raise PydanticCustomError(
                "url",
                "'url' contains a user, a password or a query, but recipes are shared. Put the key "
                "into an environment variable and set 'key_from' to its name.",
            )
        return self

    @property
    def tokenizer_source(self) -> tuple[str, str | None] | None:
        """Name and revision of the tokenizer whose template is known here; None without one."""
        return (self.tokenizer, None) if self.tokenizer else None

    def public(self) -> RemoteTeacherRecipe:
        """The same without its address, for a card."""
        return self.model_copy(update={"url": type(self).model_fields["url"].default})

    @property
    def stated_license(self) -> str | None:
        return self.license
