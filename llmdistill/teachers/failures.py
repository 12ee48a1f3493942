"""What is wrong with a server, and whether asking again can help."""

from __future__ import annotations

import socket
import ssl
from typing import Any
from urllib.parse import urljoin, urlsplit

from llmdistill.errors import TeacherError

TOO_MANY = 429
TRY_AGAIN = (408, 409, 425, TOO_MANY)  # HTTP statuses to retry, as are all from 500
# Statuses that concern the content of one request (too long, for example), so that others may
# succeed.  Such a request loses its row, and the run continues.
REFUSED_STATUS = (400, 413, 422)
HINTS = {
    401: ". Set teacher.key_from to the environment variable that holds your key.",
    403: ". Set teacher.key_from to the environment variable that holds your key.",
    404: ". Check that teacher.url has the path of the server's API (.../v1) and that the server "
    "has this model.",
}


def check_status(url: str, error: Any, wrong: str) -> None:
    """Raise TeacherError for an HTTP status that asking again does not change."""
    status, hint = error.status_code, ""
    if 300 <= status < 400:
        found = urlsplit(urljoin(url, error.response.headers.get("location", "")))
        hint = (
            f". It redirects to {found.scheme}://{found.hostname or ''}"
            f"{f':{found.port}' if found.port else ''}{found.path}, which is not followed, "
            "because your prompts would go there. If that is right, set teacher.url to it."
        )
    elif error.code == "insufficient_quota":
        hint = ". The account has no credit left. Earlier replies are recorded: pass resume."
    elif status in TRY_AGAIN or status >= 500:
        return
    hint = hint or HINTS.get(status, "")
    raise TeacherError(f"{url} rejected the request: {wrong[:500]}{hint}") from error


def why_unreached(url: str, error: BaseException, *, is_well: bool) -> str:
    """Return why the server could not be reached.

    Raises TeacherError if asking again does not help: a host that nobody knows, or a
    certificate that is not trusted.  A server that `is_well` has given replies before.
    """
    cause = _innermost(error)
    is_plain = getattr(cause, "reason", "") == "WRONG_VERSION_NUMBER"  # a server without TLS
    if (isinstance(cause, ssl.SSLCertVerificationError) or is_plain) and not is_well:
        raise TeacherError(
            f"{url} cannot be reached over TLS: {cause}. For a certificate of your own, "
            "set the environment variable SSL_CERT_FILE to its file; for a server without "
            "TLS, let teacher.url start with http://."
        ) from error
    # A name server that is busy (EAI_AGAIN) may know the host later.
    is_unknown = isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN
    if is_unknown and not is_well:
        raise TeacherError(
            f"the host of {url} is not known: {cause}. Check teacher.url."
        ) from error
    if isinstance(error, TimeoutError) or cause is error:
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__}: {type(cause).__name__}: {cause}"


def _innermost(error: BaseException) -> BaseException:
    """Return the error that caused all others."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif (inner := error.__cause__ or error.__context__) is not None:
            error = inner
        else:
            return error
