"""Server-sent events: an answer as a stream that lives through long prefills and notices readers who are gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

PING_S = 15.0
"""Seconds between signs of life. Proxies and clients give up after 30 to 60 seconds of silence."""
SLOW_READER_S = 60.0
"""Seconds that a client may leave a full buffer unread before its answer is cancelled."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"


def event(body: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event.

    Args:
        body: sent as one line of JSON.
        name: of the event, for clients that read names.
    """
    line = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {line}\n\n".encode("utf-8", errors="replace")


def events(bodies: Iterable[Mapping[str, Any]], *, is_named: bool = False) -> bytes:
    """Several events; with `is_named` each bears its `type` as name."""
    return b"".join(event(body, str(body["type"]) if is_named else None) for body in bodies)


def comment(text: str) -> bytes:
    """A line that clients skip."""
    return f": {text}\n\n".encode()


class EventStream(StreamingResponse):
    """A response of server-sent events.

    Args:
        body: yields bytes of whole events; it is closed at once when the client leaves or does not read.
        close: called at the end, however it comes; a body that was never begun cannot see its own end.
    """

    def __init__(self, body: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self._body, self._close = body, close
        super().__init__(body, media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Message) -> None:
            async with asyncio.timeout(SLOW_READER_S):
                await send(message)

        try:
            await super().__call__(scope, receive, send_soon)
        except TimeoutError:
            return  # the connection is closed without the end of the chunks, so the client sees a broken answer
        finally:
            self._close()
            await self._body.aclose()
