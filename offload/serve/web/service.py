"""What all endpoints share: the model's names, whether it is there, and the way from a request to its response."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel
from starlette.requests import Request

from ...engine.counters import EngineCounters
from ...engine.events import Position
from ..answers import Delta
from ..wire.errors import ApiError, openai_error
from . import sse
from .answering import LOADING_RETRY_S, Desk, Running, expect_success
from .metrics import Metrics

PROGRESS_S = 1.0
"""Seconds between two reports of a prompt's progress to a client that asks for them; people read one a second."""


class Writer(Protocol):
    """Writes the answers to one request in one dialect."""

    def begin(self) -> list[dict[str, Any]]: ...

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]: ...

    def end(self) -> list[dict[str, Any]]: ...

    def whole(self, answers: list[list[Delta]]) -> dict[str, Any]: ...


@dataclass
class Service:
    """The served model.

    Args:
        names: names that requests may use; the first is the one that answers bear.
        metrics: counts.
        is_any_name: whether requests may name any model.
        created_s: when it was loaded, in seconds since 1970.
        defaults: sampling of requests that name none.
        desk: takes requests; None while the model is loading.
        stage: what is being done while it is loading.
        is_draining: whether the server is shutting down and takes no more requests.
        failure: why the engine has ended; empty while it runs.
        budget: bytes of memory by part.
        counters: gives the engine's counts; None while the model is loading.
        arithmetic: what is promised of the model's bits.
        desks: of each member, where several models answer.
        route: who of them answers a text, given the member that a request names, or None.
    """

    names: tuple[str, ...]
    metrics: Metrics
    is_any_name: bool = False
    created_s: int = 0
    defaults: Mapping[str, float] = field(default_factory=dict)
    desk: Desk | None = None
    stage: str = "loading"
    is_draining: bool = False
    failure: str = ""
    budget: Mapping[str, int] = field(default_factory=dict)
    counters: Callable[[], EngineCounters] | None = None
    arithmetic: str = ""
    running: set[Running] = field(default_factory=set)
    desks: Mapping[str, Desk] = field(default_factory=dict)
    route: Callable[[str, str | None], str] | None = None

    def answering(self, wanted: str | None, body: BaseModel) -> tuple[str, Desk]:
        """Who answers a request: the name that the answer bears, and the desk that takes it.

        Args:
            wanted: the model that the request names.
            body: what it says; of several members, its text chooses one unless a member is named.

        Raises:
            ApiError: 404 if there is no such model, 503 as `ready`.
        """
        name, desk = self.model_name(wanted), self.ready()
        if self.route is None:
            return name, desk
        member = self.route(said_in(body), None if name == self.names[0] else name)
        return member, self.desks[member]

    def ready(self) -> Desk:
        """The desk.

        Raises:
            ApiError: 503 while there is none, or no more requests are taken.
        """
        if self.failure:
            raise ApiError(503, f"the engine has failed: {self.failure}", code="engine_failed")
        if self.is_draining:
            raise self._refused("shutdown", "the server is shutting down", "shutting_down")
        if self.desk is None:
            raise self._refused("loading", f"the model is not ready yet ({self.stage})", "loading")
        return self.desk

    def model_name(self, wanted: str | None) -> str:
        """The name that an answer bears.

        Raises:
            ApiError: 404 if there is no such model.
        """
        if wanted is None or wanted in self.names or self.is_any_name:
            return self.names[0] if wanted is None else wanted
        raise ApiError(
            404,
            f"The model {wanted[:200]!r} does not exist; there is {', '.join(self.names)}",
            code="model_not_found",
            param="model",
        )

    async def open(self, desk: Desk, asks: list[Any]) -> Running:
        """Hand asks to the engine; counts refusals.

        Raises:
            ApiError: as `Desk.open`.
        """
        try:
            running = await desk.open(asks)
        except ApiError as error:
            self.metrics.refused(error.code or str(error.status))
            raise
        self.running.add(running)
        return running

    def close(self, running: Running) -> None:
        """A request has its answer, or its client has left."""
        running.cancel()
        self.running.discard(running)

    def _refused(self, reason: str, message: str, code: str) -> ApiError:
        self.metrics.refused(reason)
        return ApiError(503, message, code=code, retry_after_s=LOADING_RETRY_S)


SAID_BY = ("messages", "prompt", "input")
"""Fields of requests in which users speak, in all dialects."""


def said_in(body: BaseModel) -> str:
    """All texts that a request's user says."""
    return "\n".join(_texts([getattr(body, name, None) for name in SAID_BY]))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a part of a request, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, BaseModel):
        yield from _texts([getattr(value, name, None) for name in ("content", "text")])
    elif isinstance(value, dict):
        yield from _texts([value.get("content"), value.get("text")])
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def new_id() -> str:
    """A fresh id of an answer."""
    return secrets.token_hex(12)


def owner_of(request: Request) -> str:
    """Who asks, as the gate found out."""
    return str(request.scope["state"]["owner"])


async def whole_answer(service: Service, running: Running, request: Request, writer: Writer) -> dict[str, Any]:
    """The response of a request that does not stream; it is cancelled when the client leaves.

    Raises:
        ApiError: as `Running.whole`; 499 if the client has left.
    """
    answer = asyncio.ensure_future(running.whole())
    left = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "the client has left")
        return writer.whole(await answer)
    finally:
        service.close(running)
        for task in (answer, left):
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def streamed_answer(
    running: Running,
    writer: Writer,
    *,
    is_named: bool = False,
    error_bodies: Callable[[ApiError], list[dict[str, Any]]] = lambda error: [openai_error(error)],
    last: bytes = sse.DONE,
    progress: Callable[[Position, float], list[dict[str, Any]]] | None = None,
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer.

    Args:
        running: the answers; who sends the events closes them.
        writer: writes them.
        is_named: whether events bear names.
        error_bodies: writes an error that comes after the first event.
        last: what ends the stream.
        progress: writes how far a prompt is, given that and the seconds since it came; None writes comments.
    """
    idle_s = sse.PING_S if progress is None else PROGRESS_S
    try:
        yield sse.events(writer.begin(), is_named=is_named)
        async with aclosing(running.deltas(idle_s)) as deltas:
            async for index, delta in deltas:
                if delta is None:
                    position = running.position()
                    if progress is not None and position.state in ("queued", "prefill"):
                        yield sse.events(progress(position, running.age_s))
                    else:
                        yield sse.comment(_progress(position))
                    continue
                expect_success(delta)
                if chunks := writer.chunks(index, delta):
                    yield sse.events(chunks, is_named=is_named)
        yield sse.events(writer.end(), is_named=is_named) + last
    except ApiError as error:
        yield sse.events(error_bodies(error), is_named=is_named) + last


def _progress(position: Position) -> str:
    """How far a request is that has no new token, for readers of the raw stream."""
    if position.state == "queued":
        return f"queued, {position.ahead} ahead"
    return f"{position.state} {position.prefilled_tokens} of {position.prompt_tokens} prompt tokens"
