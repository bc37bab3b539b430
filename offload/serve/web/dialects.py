"""The endpoints besides chat completions and completions: Anthropic's messages, and OpenAI's responses."""

from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from ..wire.errors import ApiError, anthropic_error, openai_error
from ..wire.message_writer import MessagesWriter
from ..wire.messages import CountRequest, MessagesRequest
from ..wire.response_writer import ResponsesWriter
from ..wire.responses import ResponsesRequest
from .described import ANSWER, ANTHROPIC_ERRORS
from .service import Service, new_id, owner_of, streamed_answer, whole_answer
from .sse import EventStream


def add_messages(app: FastAPI, service: Service) -> None:
    """Add Anthropic's endpoints."""

    @app.post("/v1/messages", response_model=None, responses={**ANTHROPIC_ERRORS, **ANSWER})
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """The next message of a conversation."""
        name, desk = service.answering(body.model, body)
        ask = await desk.prepare(lambda: body.ask(desk.asker, defaults=service.defaults, owner=owner_of(request)))
        writer = MessagesWriter(new_id(), name, len(ask.prompt_ids))
        running = await service.open(desk, [ask])
        if body.stream:
            parts = streamed_answer(
                running, writer, is_named=True, error_bodies=lambda error: [anthropic_error(error)], last=b""
            )
            return EventStream(parts, lambda: service.close(running))
        return JSONResponse(await whole_answer(service, running, request, writer))

    @app.post("/v1/messages/count_tokens", responses=ANTHROPIC_ERRORS)
    async def count(body: CountRequest) -> dict[str, int]:
        """Tokens of a conversation."""
        _, desk = service.answering(body.model, body)
        return {"input_tokens": await desk.prepare(lambda: body.count(desk.asker))}


def add_responses(app: FastAPI, service: Service) -> None:
    """Add OpenAI's newer endpoint."""

    @app.post("/v1/responses", response_model=None, responses=ANSWER)
    @app.post("/responses", response_model=None, include_in_schema=False)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """The next items of a conversation."""
        name, desk = service.answering(body.model, body)
        ask = await desk.prepare(lambda: body.ask(desk.asker, defaults=service.defaults, owner=owner_of(request)))
        writer = ResponsesWriter(new_id(), name, body.echoed())
        running = await service.open(desk, [ask])
        if not body.stream:
            return JSONResponse(await whole_answer(service, running, request, writer))

        def failed(error: ApiError) -> list[dict[str, Any]]:
            return [writer.failed(openai_error(error))]

        parts = streamed_answer(running, writer, is_named=True, error_bodies=failed, last=b"")
        return EventStream(parts, lambda: service.close(running))
