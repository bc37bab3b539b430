"""What is answered when something is wrong with a request, or with this program: one form for all errors."""

import json
import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..wire.errors import ApiError
from .guard import refusal

logger = logging.getLogger("expertier.serve")
BRANCHES = re.compile(r"[A-Z]\w*|str|int|float|bool|.*[\[({-].*")
"""How pydantic names the branches of a union in an error's place; clients know only fields."""


def answer_errors(app: FastAPI) -> None:
    """Answer every error of an application in the form of the OpenAI or the Anthropic interface."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return refusal(request.url.path, error)

    async def wrong_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refusal(request.url.path, _as_api_error(error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else None
        message = f"{request.method} {request.url.path}: {error.detail}"
        return refusal(request.url.path, ApiError(error.status_code, message, code=code))

    async def fault(request: Request, error: Exception) -> Response:
        logger.error("%r failed: %s: %r", request.url.path, type(error).__name__, str(error))
        message = f"the server failed on this request ({type(error).__name__})"
        return refusal(request.url.path, ApiError(500, message, code="server_error"))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, wrong_request)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, fault)


def _as_api_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request."""
    # of the branches of a union, the one that went furthest is what the client meant
    first = max(error.errors(), key=lambda entry: (len(entry["loc"]), not entry["type"].endswith("_type")))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json")
    param = _param(first["loc"][1:])
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    if not param and ": " in message:
        param, message = message.split(": ", 1)
    if first["type"] not in ("missing", "value_error"):
        message += f"; got {_shown(first['input'])}"
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None, code="invalid_type")


def _shown(value: Any) -> str:
    """A value of a request, short."""
    if isinstance(value, str | int | float | None):
        text = json.dumps(value)
        return text if len(text) <= 60 else f"{text[:56]}..."
    return {"list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)


def _param(place: tuple[int | str, ...]) -> str:
    """A field's place as clients write it: `messages[0].role`."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not BRANCHES.fullmatch(part):
            text += f".{part}" if text else part
    return text
