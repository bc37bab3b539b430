"""Errors as clients of the OpenAI and the Anthropic interface expect them."""

import math
from typing import Any

from ..asks import ContextFull

# what the two interfaces call an error of each status, by their own documentation
OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    504: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
# the same of the other one
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
LONGEST_WAIT_S = 120
"""Seconds in Retry-After at most; the OpenAI and Anthropic clients ignore longer ones."""


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what was expected, what was got, what to do.
        code: a word for programs, or None.
        param: field of the request that is wrong, or None.
        retry_after_s: when to ask again, in seconds, or None.
        is_final: whether asking again makes no sense, which clients would otherwise do by themselves.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s, self.is_final = retry_after_s, is_final

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the error."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.is_final:
            headers["x-should-retry"] = "false"
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(min(max(math.ceil(self.retry_after_s), 1), LONGEST_WAIT_S))
        return headers


def wrong_field(error: ValueError, param: str | None = None) -> ApiError:
    """A 400 for a value that was refused.

    Args:
        error: its message says what was expected and got.
        param: the field; None takes the message's first word if it is a field's name.
    """
    if isinstance(error, ContextFull):
        return ApiError(400, str(error), code="context_length_exceeded", param="messages")
    word = str(error).split(maxsplit=1)[0].rstrip(":") if str(error) else ""
    named = word if "_" in word or word in ("temperature", "seed", "tools", "stop", "prompt") else None
    return ApiError(400, str(error), param=param or named, code="invalid_value")


OVERLOADED = 529
"""Anthropic's status for a server that cannot answer now."""


def status_of(error: ApiError, *, is_anthropic: bool) -> int:
    """The HTTP status of an error in one of the interfaces: they differ for a server that will answer later."""
    is_overload = error.status == 503 and error.retry_after_s is not None
    return OVERLOADED if is_anthropic and is_overload else error.status


def openai_error(error: ApiError) -> dict[str, Any]:
    """The body of an error, as OpenAI writes it."""
    kind = OPENAI_TYPES.get(error.status, "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """The body of an error, as Anthropic writes it."""
    kind = ANTHROPIC_TYPES.get(error.status, "api_error")
    where = f"{error.param}: " if error.param and error.param not in error.message else ""
    return {"type": "error", "error": {"type": kind, "message": where + error.message}}
