"""The application: the endpoints of the OpenAI interface, and what is answered when something is wrong."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from ...engine.events import TokenEvent
from ..wire.chat import ChatRequest, ChatWriter
from ..wire.completions import CompletionRequest, CompletionWriter
from .answering import Desk
from .described import ANSWER, OPENAI_ERRORS
from .dialects import add_messages, add_responses
from .faults import answer_errors
from .guard import Gate, Guarded
from .service import Service, new_id, owner_of, streamed_answer, whole_answer
from .sse import EventStream
from .state import add_state


def make_app(service: Service, gate: Gate) -> ASGIApp:
    """The application for one served model.

    Args:
        service: the model, loaded or loading.
        gate: says who may ask.
    """
    app = FastAPI(
        title="expertier", docs_url=None, redoc_url=None, openapi_url="/openapi.json", responses=OPENAI_ERRORS
    )
    answer_errors(app)
    _add_openai(app, service)
    add_messages(app, service)
    add_responses(app, service)
    add_state(app, service)
    guarded: ASGIApp = Guarded(app, gate)
    if gate.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=gate.origins, allow_methods=("GET", "POST"), allow_headers=("*",)
        )
    return guarded


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses=ANSWER)
    @app.post("/chat/completions", response_model=None, include_in_schema=False)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next message of a conversation."""
        name, desk = service.answering(body.model, body)
        ask = await desk.prepare(lambda: body.ask(desk.asker, defaults=service.defaults, owner=owner_of(request)))
        asks = [ask.nth(index) for index in range(body.n or 1)]
        writer = ChatWriter(new_id(), name, body, speller(desk))
        running = await service.open(desk, asks)
        if not body.stream:
            return JSONResponse(await whole_answer(service, running, request, writer))
        parts = streamed_answer(running, writer, progress=writer.progress if body.return_progress else None)
        return EventStream(parts, lambda: service.close(running))

    @app.post("/v1/completions", response_model=None, responses=ANSWER)
    @app.post("/completions", response_model=None, include_in_schema=False)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """The continuation of texts or token ids."""
        name, desk = service.answering(body.model, body)
        asks = await desk.prepare(lambda: body.asks(desk.asker, defaults=service.defaults, owner=owner_of(request)))
        echoes = [desk.asker.vocabulary.decode(ask.prompt_ids) if body.echo else "" for ask in asks]
        asks = [ask.nth(index) for ask in asks for index in range(body.n or 1)]
        writer = CompletionWriter(new_id(), name, body, echoes, speller(desk))
        running = await service.open(desk, asks)
        if not body.stream:
            return JSONResponse(await whole_answer(service, running, request, writer))
        return EventStream(streamed_answer(running, writer), lambda: service.close(running))

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        """The names of the served model."""
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One name of the served model."""
        if name not in service.names:
            service.model_name(name)
        return _model(service, name)


def _model(service: Service, name: str) -> dict[str, Any]:
    context = None if service.desk is None else service.desk.asker.context
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "expertier",
        "max_model_len": context,
        "context_length": context,
    }


def speller(desk: Desk) -> Callable[[TokenEvent], dict[str, Any]]:
    """Writes a token with its log-probabilities and its bytes; characters may be cut between tokens."""
    vocabulary = desk.asker.vocabulary

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = desk.grammars.bytes_of(token_id)
        # JSON has no infinity; a token that cannot come has a logit of -inf
        number = max(logprob, -9999.0) if logprob is not None else None
        return {"token": vocabulary.spell([token_id]), "logprob": number, "bytes": list(data)}

    def spell(token: TokenEvent) -> dict[str, Any]:
        top = [entry(*pair) for pair in token.top_logprobs]
        return {**entry(token.token_id, token.logprob), "top_logprobs": top}

    return spell
