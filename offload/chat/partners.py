"""Who answers: a model in this process, or a server of the OpenAI interface."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .talk import SAMPLING, Talk


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of an answer.

    Args:
        channel: `content`, or `reasoning` before it.
        text: what came since the piece before.
    """

    channel: Literal["content", "reasoning"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Took:
    """What an answer took.

    Args:
        reason: `stop`, `length` or another word of the server.
        prompt_tokens: tokens of the conversation, of which `cached_tokens` were kept from before.
        completion_tokens: tokens generated.
        first_s: seconds until the first piece.
        seconds: in all.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_s: float
    seconds: float

    def line(self) -> str:
        """The same, for people."""
        decode_s = self.seconds - self.first_s
        rate = (self.completion_tokens - 1) / decode_s if decode_s > 0 and self.completion_tokens > 1 else 0.0
        return (
            f"{self.completion_tokens} tokens, {rate:.2f} tok/s, first after {self.first_s:.1f} s; "
            f"{self.prompt_tokens} of prompt, {self.cached_tokens} kept ({self.reason})"
        )


class Partner(Protocol):
    """Answers conversations."""

    def reply(self, talk: Talk) -> Iterator[Piece | Took]:
        """The answer to the last message, piece by piece; the last is a Took. Closing the iterator stops it."""

    def state(self) -> list[str]:
        """Lines about memory and experts, as far as they are known."""

    def close(self) -> None:
        """Free what it holds."""


class LocalPartner:
    """A model in this process.

    Args:
        opened: of `offload.serve.opening`.
    """

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def reply(self, talk: Talk) -> Iterator[Piece | Took]:
        """The answer, by the engine."""
        from ..engine.request import Sampling
        from ..serve.answers import Ended, Said, read_answer
        from ..serve.asks import Limits

        given = {name: talk.settings[name] for name in (*SAMPLING, "seed") if name in talk.settings}
        sampling = Sampling(**{"temperature": 1.0, **self._opened.defaults, **given})
        most = talk.settings.get("max_new_tokens")
        limits = Limits(sampling=sampling, max_new_tokens=None if most is None else int(most))
        settings = {} if talk.thinking is None else {"enable_thinking": talk.thinking}
        asker = self._opened.asker
        ask = asker.chat(talk.shown, limits, settings=settings)
        started, first_s = time.perf_counter(), 0.0
        for delta in read_answer(self._opened.engine, ask, asker.vocabulary):
            if isinstance(delta, Said):
                first_s = first_s or time.perf_counter() - started
                yield Piece(channel=delta.channel, text=delta.text)
            elif isinstance(delta, Ended):
                if delta.reason == "error":
                    raise RuntimeError(delta.message)
                yield Took(
                    reason=delta.reason,
                    prompt_tokens=delta.usage.prompt_tokens,
                    cached_tokens=delta.usage.cached_tokens,
                    completion_tokens=delta.usage.completion_tokens,
                    first_s=first_s,
                    seconds=time.perf_counter() - started,
                )

    def state(self) -> list[str]:
        """Hit rate, bytes and memory by part."""
        from routing.ground.quantity import format_size

        now = self._opened.engine.counters()
        hits, misses = sum(now.hits_L), sum(now.misses_L)
        return [
            f"experts: hit rate {hits / max(hits + misses, 1):.3f}, read {format_size(sum(now.bytes_read_L))}",
            f"disk busy {now.disk_busy_s:.1f} s, model {now.prefill_s + now.decode_s:.1f} s",
            "memory: " + ", ".join(f"{part} {format_size(size)}" for part, size in self._opened.budget.items()),
        ]

    def close(self) -> None:
        """End the engine."""
        self._opened.engine.close(grace_s=0)


class ServerPartner:
    """A server with `/v1/chat/completions`.

    Args:
        url: its base, with or without `/v1`.
        model: name of the model there; None takes the first that it lists.
        key: API key; empty sends none.

    Raises:
        ValueError: if it cannot be reached or lists no model.
    """

    def __init__(self, url: str, model: str | None = None, key: str = "") -> None:
        import httpx

        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ValueError(f"--server {url}: expected http://HOST:PORT")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # a cold prefill from a disk takes minutes; a server that is gone is noticed at once all the same
        self._client = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(600, connect=10))
        self.model = model or self._first_model(url)

    def reply(self, talk: Talk) -> Iterator[Piece | Took]:
        """The answer, by the server."""
        import httpx

        started, first_s, reason = time.perf_counter(), 0.0, "stop"
        usage: dict[str, Any] = {}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=self._body(talk)) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise RuntimeError(f"the server refuses: {_message(answer.text) or answer.status_code}")
                for event in _events(answer.iter_lines()):
                    usage = event.get("usage") or usage
                    for choice in event.get("choices") or ():
                        reason = choice.get("finish_reason") or reason
                        for piece in _pieces(choice.get("delta") or {}):
                            first_s = first_s or time.perf_counter() - started
                            yield piece
        except httpx.HTTPError as error:
            raise RuntimeError(f"the server cannot be reached ({type(error).__name__}: {error})") from error
        yield Took(
            reason=reason,
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens", 0)),
            first_s=first_s,
            seconds=time.perf_counter() - started,
        )

    def state(self) -> list[str]:
        """Which server and model."""
        return [f"{self.model} at {self._client.base_url}"]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _first_model(self, url: str) -> str:
        import httpx

        try:
            answer = self._client.get("/v1/models")
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            self._client.close()
            raise ValueError(f"--server {url}: no list of models ({type(error).__name__}: {error})") from error

    def _body(self, talk: Talk) -> dict[str, Any]:
        settings = dict(talk.settings)
        most = settings.pop("max_new_tokens", None)
        return {
            "model": self.model,
            "messages": talk.shown,
            "stream": True,
            "stream_options": {"include_usage": True},
            **settings,
            **({} if most is None else {"max_tokens": most}),
            **({} if talk.thinking is None else {"chat_template_kwargs": {"enable_thinking": talk.thinking}}),
        }


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Bodies of the events of a stream.

    Raises:
        RuntimeError: for an error in it, or what is no JSON.
    """
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if not data:
            continue
        try:
            event = json.loads(data)
        except ValueError as error:
            raise RuntimeError(f"the server sent no JSON ({error})") from error
        if not isinstance(event, dict):
            raise RuntimeError("the server sent an event that is no object")
        if event.get("error"):
            raise RuntimeError(f"the server failed: {_message(data) or 'without a reason'}")
        yield event


def _pieces(delta: Mapping[str, Any]) -> Iterator[Piece]:
    thought = delta.get("reasoning_content") or delta.get("reasoning")
    if thought:
        yield Piece(channel="reasoning", text=str(thought))
    if delta.get("content"):
        yield Piece(channel="content", text=str(delta["content"]))


def _message(text: str) -> str:
    """The message of an error's body."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text.strip()[:200]
