"""What the server says about itself: health, version, counts, and a page that shows them."""

import time
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, JSONResponse, Response

from .service import Service

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_state(app: FastAPI, service: Service) -> None:
    """Add `/health`, `/version`, `/metrics`, `/status` and the page at `/`."""

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Whether requests are answered."""
        state = state_of(service)
        if state == "ready":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": state, "stage": service.stage}, 503, {"Retry-After": "5"})

    @app.get("/version")
    async def package_version() -> dict[str, str]:
        """The version of this package."""
        try:
            return {"version": version("expertier")}
        except PackageNotFoundError:
            return {"version": "unknown"}

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/status")
    async def status() -> dict[str, Any]:
        """What the page shows: counts of the engine and the experts since the start, memory by part."""
        desk = service.ready() if service.counters is None else service.desk
        counters = {} if service.counters is None else service.counters().as_json()
        return {
            **counters,
            "state": state_of(service),
            "names": service.names,
            "context": None if desk is None else desk.asker.context,
            "arithmetic": service.arithmetic,
            "budget": dict(service.budget),
            "time_s": time.monotonic(),
        }

    page = (files(__package__) / "status.html").read_text(encoding="utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def show() -> Response:
        """A page for people."""
        return HTMLResponse(page, headers=PAGE_HEADERS)


def state_of(service: Service) -> str:
    """One word: loading, ready, shutting down or failed."""
    if service.failure:
        return "failed"
    if service.is_draining:
        return "shutting down"
    return "loading" if service.desk is None else "ready"
