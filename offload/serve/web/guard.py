"""Who may ask: API keys, hosts and origins; how much may be sent. A layer around the whole application."""

import asyncio
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..wire.errors import ApiError, anthropic_error, openai_error, status_of

LARGEST_BODY = 8 << 20
"""Bytes of a request. The longest prompts of agents have some 300,000."""
SLOWEST_BODY_S = 60.0
"""Seconds for a whole request to arrive: a client that sends a byte a minute must not hold a connection. Not tuned."""
MOST_KEYS, LONGEST_KEY = 64, 512
"""Keys of a file, and characters of one: each request is compared with all of them. Not tuned."""
OPEN_PATHS = ("/health", "/", "/favicon.ico")
"""Need no key: whether the server lives, and a page that holds no numbers until a key is typed in."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Who may ask.

    Args:
        keys: accepted API keys; empty lets everybody ask who reaches the server.
        hosts: names in the Host header that are answered without a key, besides addresses and the loopback names. It
            keeps web pages out that let their own name point here.
        origins: web pages, as `https://host`, whose scripts may ask.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def check(self, path: str, headers: Headers) -> None:
        """Let a request pass.

        Raises:
            ApiError: 401 for a missing or wrong key, 403 for a foreign host or web page.
        """
        if self.keys:
            if path not in OPEN_PATHS:
                self._check_key(headers)
            return
        host = _host_of(headers.get("host", ""))
        if not (_is_address(host) or host in (*LOOPBACK, *self.hosts)):
            raise ApiError(403, "this server does not answer to this Host name; start it with --allow-host or a key")
        origin = headers.get("origin")
        if origin and origin not in self.origins and urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, "this server does not answer to this web page; start it with --cors ORIGIN")

    def owner(self, headers: Headers) -> str:
        """A name for who asks, that is not the key: prefixes are kept for each apart."""
        given = _given_key(headers)
        return next((f"key {index}" for index, key in enumerate(self.keys) if _is_same(key, given)), "")

    def _check_key(self, headers: Headers) -> None:
        given = _given_key(headers)
        # every key is compared, in a time that does not depend on where it differs
        found = [_is_same(key, given) for key in self.keys]
        if not given:
            raise ApiError(401, "no API key: send Authorization: Bearer KEY or x-api-key: KEY", code="invalid_api_key")
        if not any(found):
            raise ApiError(401, "the API key is not known", code="invalid_api_key")


def _is_same(key: str, given: str) -> bool:
    return hmac.compare_digest(key.encode(), given.encode())


def _given_key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or headers.get("api-key") or ""


def _host_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def read_keys(file: Path) -> tuple[str, ...]:
    """The API keys of a file, one a line; empty lines and lines with # are left out.

    Raises:
        ValueError: if it cannot be read, has none, too many, or one that is no printable ASCII word.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"key file {file}: cannot be read ({error})") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not 0 < len(keys) <= MOST_KEYS:
        raise ValueError(f"key file {file}: expected 1 to {MOST_KEYS} keys, one a line; got {len(keys)}")
    for number, key in enumerate(keys, 1):
        if len(key) > LONGEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"key file {file}: key {number} is no word of printable ASCII characters")
    return keys


class Guarded:
    """An application behind a gate, which gets bodies only when they are whole.

    Args:
        app: answers what passes.
        gate: says who may ask.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._gate.check(scope["path"], headers)
            whole = await _whole_body(headers, receive)
        except ApiError as error:
            await refusal(scope["path"], error, is_final=True)(scope, receive, send)
            return
        if whole is None:
            return  # the client left before it had sent all
        scope.setdefault("state", {})["owner"] = self._gate.owner(headers)
        # every endpoint reads JSON, whatever a client calls it: curl says that it is a form
        others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        scope["headers"] = [*others, (b"content-type", b"application/json")]
        await self._app(scope, _replayed(whole, receive), send)


def refusal(path: str, error: ApiError, *, is_final: bool = False) -> Response:
    """The response for an error, in the dialect of the path.

    Args:
        path: what was asked for.
        error: what is wrong.
        is_final: close the connection, because the body was not read to its end.
    """
    is_anthropic = path.startswith("/v1/messages")
    body = anthropic_error(error) if is_anthropic else openai_error(error)
    headers = {**error.headers, **({"Connection": "close"} if is_final else {})}
    text = json.dumps(body, ensure_ascii=True)
    return Response(text, status_of(error, is_anthropic=is_anthropic), headers, media_type="application/json")


async def _whole_body(headers: Headers, receive: Receive) -> bytes | None:
    """The body; None if the client left.

    Raises:
        ApiError: 413 if it is too large, 408 if it takes too long.
    """
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > LARGEST_BODY:
        raise _too_large()
    pieces, size = [], 0
    try:
        async with asyncio.timeout(SLOWEST_BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > LARGEST_BODY:
                    raise _too_large()
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise ApiError(408, f"the request was not there within {SLOWEST_BODY_S:.0f} s") from None


def _too_large() -> ApiError:
    return ApiError(413, f"the request is larger than {LARGEST_BODY} bytes", code="request_too_large")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def expect_safe(host: str, gate: Gate, *, is_insecure: bool) -> None:
    """Refuse to listen to the network without a key.

    Raises:
        ValueError: if `host` is none of this machine's own and there are no keys, unless that is wanted.
    """
    if host not in LOOPBACK and not gate.keys and not is_insecure:
        raise ValueError(
            f"--host {host} lets others in this network use the model, and there is no key; give --api-key-file FILE, "
            "or --insecure if that is wanted"
        )


def as_origins(given: Iterable[str]) -> tuple[str, ...]:
    """Origins as browsers send them.

    Raises:
        ValueError: if one is no `scheme://host`.
    """
    origins = tuple(origin.rstrip("/") for origin in given)
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or "*" in origin:
            raise ValueError(f"--cors {origin}: expected an origin such as http://localhost:3000")
    return origins
