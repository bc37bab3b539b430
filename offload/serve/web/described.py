"""What `/openapi.json` says of responses: the two forms of errors, and answers that may be streams."""

from typing import Any

from pydantic import BaseModel


class OpenAIFault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error of the OpenAI interface."""

    error: OpenAIFault


class AnthropicFault(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    """An error of the Anthropic interface."""

    type: str
    error: AnthropicFault


Responses = dict[int | str, dict[str, Any]]


def errors(form: type[BaseModel]) -> Responses:
    """Errors of all statuses in one form."""
    return {
        "4XX": {"model": form, "description": "The request is refused."},
        "5XX": {"model": form, "description": "This server cannot answer now, or failed."},
    }


OPENAI_ERRORS, ANTHROPIC_ERRORS = errors(OpenAIError), errors(AnthropicError)
ANSWER: Responses = {
    200: {"description": "The whole answer, or its events.", "content": {"text/event-stream": {}}},
}
"""Added to what FastAPI says of an endpoint: its answer is JSON, or events if the request asks for them."""
