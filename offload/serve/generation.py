"""Greedy generation with a live text, progress, timings and a trace that is on disk while it grows."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.generation.streamers import BaseStreamer

from routing.ground.hardware import Hardware
from routing.ground.model_config import experts_per_token
from routing.ground.quantity import format_size

from .prefill import Prefill


class Text(Protocol):
    """What turns tokens into text."""

    def decode(self, token_ids: Sequence[int]) -> str: ...


TRACE_EVERY_S = 5.0
"""Most seconds of routing that a power cut costs. A save rewrites the whole trace, and generation waits meanwhile:
0.2 s for 1,000 tokens of 16 layers with K = 8 on two slow cores."""
STATUS_EVERY_S = 0.5
"""Twice a second can be read; each line asks for a whole report. Other values were not tried."""


class LiveText(BaseStreamer):  # type: ignore[misc]
    """Receives tokens from `generate`: shows them, notes when they came, saves the trace, reports speed now and then.

    Args:
        text: turns tokens into text.
        show: receives pieces of text; a character whose bytes are incomplete waits.
        save_trace: called every TRACE_EVERY_S seconds.
        say_status: receives tokens per second, every STATUS_EVERY_S seconds.
        after_prefill: called when the first token is there.
    """

    def __init__(
        self,
        text: Text,
        show: Callable[[str], None],
        save_trace: Callable[[], None] | None,
        say_status: Callable[[float], None] | None = None,
        after_prefill: Callable[[], None] = lambda: None,
    ) -> None:
        self._after_prefill = after_prefill
        self.token_ids: list[int] = []
        self.time_s: list[float] = []
        self._text, self._show, self._save_trace, self._say_status = text, show, save_trace, say_status
        self._shown = ""
        self._saved_s = self._said_s = time.perf_counter()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        if not self.token_ids:
            self._after_prefill()
        self.token_ids.extend(value.reshape(-1).tolist())
        self.time_s.append(time.perf_counter())
        whole = self.whole
        if not whole.endswith("�"):
            self._show(whole[len(self._shown) :])
            self._shown = whole
        if self._save_trace and self.time_s[-1] - self._saved_s > TRACE_EVERY_S:
            self._save_trace()
            self._saved_s = time.perf_counter()

        if self._say_status and self.time_s[-1] - self._said_s > STATUS_EVERY_S and len(self.time_s) > 1:
            self._say_status((len(self.time_s) - 1) / (self.time_s[-1] - self.time_s[0]))
            self._said_s = self.time_s[-1]

    @property
    def whole(self) -> str:
        """The text of all tokens until now, incomplete characters included."""
        return self._text.decode(self.token_ids)

    def end(self) -> None:
        self._show(self.whole[len(self._shown) :])


def generate_text(
    model: Any,
    text: Text,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    show: Callable[[str], None],
    stage: Callable[[str], None] = lambda line: None,
    trace_file: Path | None = None,
    say: Callable[[str], None] | None = None,
    hardware: Hardware | None = None,
) -> dict[str, Any]:
    """Continue a prompt greedily.

    Args:
        model: a model from `load`.
        text: turns tokens into text.
        prompt_ids: token ids of the prompt, at least one.
        max_new_tokens: most tokens to generate, 1 or more; the model's end tokens may end it earlier.
        show: receives pieces of text as they come.
        stage: receives a line about the prefill, layer by layer.
        trace_file: where the routing goes; written every few seconds and at the end, also after Ctrl-C.
        say: receives a line about speed, hits and bytes twice a second.
        hardware: rates of this machine, to predict the speed of decoding with the hit rate that it had.

    Returns:
        tokens_per_second (of decoding), predicted (on the CPU, with `hardware`), prefill_seconds, hit_rate, bytes_read,
        peak_memory_bytes, prompt_tokens, token_ids, their text and the report of the offloading.

    Raises:
        ValueError: if there is no prompt.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token")
    prefilled: dict[str, Any] = {}
    prefill = Prefill(model, len(prompt_ids), stage)

    def after_prefill() -> None:
        prefill.close()
        prefilled.update(model.offload.report())

    live = LiveText(
        text,
        show,
        None if trace_file is None else lambda: model.offload.save_trace(trace_file),
        None if say is None else lambda rate: say(_status(rate, model.offload)),
        after_prefill,
    )
    model.offload.reset()
    started = time.perf_counter()
    try:
        _continue(model, prompt_ids, max_new_tokens, live)
    finally:
        prefill.close()
        if trace_file is not None and live.time_s:
            model.offload.save_trace(trace_file)
    report = model.offload.report()
    is_predicted = hardware is not None and model.offload.lane is None
    predicted = _predicted(model, hardware, prefilled, report) if is_predicted else None
    return _result(live, started, report) | {"prompt_tokens": len(prompt_ids), "predicted": predicted}


def _continue(model: Any, prompt_ids: Sequence[int], max_new_tokens: int, live: LiveText) -> None:
    """Generate greedily; tokens go to `live` as they come."""
    model.generate(
        torch.tensor([list(prompt_ids)], device=model.device),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        streamer=live,
    )


def _result(live: LiveText, started_s: float, report: dict[str, Any]) -> dict[str, Any]:
    """What was generated and how fast: decoding counts from the first token on, the prefill until then."""
    decode_s = live.time_s[-1] - live.time_s[0]
    return {
        "tokens_per_second": (len(live.time_s) - 1) / decode_s if decode_s > 0 else 0.0,
        "prefill_seconds": live.time_s[0] - started_s,
        **{name: report[name] for name in ("hit_rate", "bytes_read", "peak_memory_bytes")},
        "token_ids": live.token_ids,
        "text": live.whole,
        "report": report,
    }


def _predicted(model: Any, hardware: Any, prefilled: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second to expect, and what binds."""
    hits, misses = (report[name] - prefilled[name] for name in ("hits", "misses"))
    hit_rate = hits / max(hits + misses, 1)
    top_k = experts_per_token(model.config) if model.offload.num_slots else 0
    found = model.offload.predict(hardware, hit_rate, top_k)
    return {"tokens_per_second": 1 / found.token_s, "binds": found.binds, "hit_rate": hit_rate, **vars(found)}


def _status(tokens_per_s: float, offload: Any) -> str:
    report = offload.report()
    return (
        f"{tokens_per_s:.2f} tok/s, hit rate {report['hit_rate']:.3f}, read {format_size(report['bytes_read'])}, "
        f"disk busy {report['share_of_floor'] or 0:.0%} of the time"
    )
