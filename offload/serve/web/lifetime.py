"""The life of a server: it listens, loads its model, answers, and ends without cutting answers off."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from .service import Service

logger = logging.getLogger("expertier.serve")
KEEP_ALIVE_S = 30
"""Seconds that an idle connection stays open; longer than clients wait between two turns of a tool. Not tuned."""
BACKLOG = 256
"""Connections that the system holds until they are accepted; more than any queue of requests that is allowed."""
HEADERS_BYTES = 1 << 16
"""Bytes of the headers of a request, as much as other servers take."""
LAST_WORDS_S = 5.0
"""Seconds for cancelled answers to send their last event. It is one message each."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; connections are taken from now on and answered when the server runs.

    Args:
        host: name or address of this machine.
        port: 0 takes any that is free.

    Raises:
        ValueError: if the address is unknown or in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}: {error.strerror or error}") from error
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise ValueError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; give another --port, or stop what uses it"
        ) from error
    return found


def address_of(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Lifetime(uvicorn.Server):
    """A server whose first signal lets running answers end, and whose second cuts them off.

    Args:
        app: the application that answers.
        service: the model; no request is taken once it is draining.
        grace_s: seconds that running answers have after the first signal.
    """

    def __init__(self, app: ASGIApp, service: Service, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(LAST_WORDS_S),
                h11_max_incomplete_event_size=HEADERS_BYTES,
            )
        )
        self._service, self._grace_s = service, grace_s
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run_with(self, listening: socket.socket, load: Callable[[], None]) -> None:
        """Answer until a signal comes, while `load` gets the model ready in a thread of its own.

        Raises:
            BaseException: what `load` raised; the server ends then.
        """
        self._loading = threading.Thread(target=self._load, args=(load,), name="load", daemon=True)
        self.run(sockets=[listening])
        if self._failure is not None:
            raise self._failure

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loading.start()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins the end, the second hastens it."""
        if self._service.is_draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._service.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_end)

    def stop(self) -> None:
        """End as after a signal; for other threads."""
        self.handle_exit(0, None)

    def _begin_end(self) -> None:
        self._ending = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Wait for running answers, then cancel them; each still sends how it ended."""
        try:
            async with asyncio.timeout(self._grace_s):
                while self._service.running:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            for running in list(self._service.running):
                running.cancel()
        self.should_exit = True

    def _load(self, load: Callable[[], None]) -> None:
        try:
            load()
        except BaseException as error:  # whatever it is, the main thread must end and say so
            self._failure = error
            self.should_exit = True
