"""Generation with a live text, progress, timings and a trace that is on disk while it grows."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from moe import Rewiring, generate_rewired
from routing.ground.hardware import Hardware
from routing.ground.model_config import experts_per_token
from routing.ground.quantity import format_size

from ..engine.request import GenerationRequest, Sampling
from ..engine.sampling import Sampler
from ..finetune.passing.through import gradients_pass
from .choosing import Choice, SampledToken, StopsWith
from .live_text import LiveText, Stretches, Text
from .prefill import Prefill


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
    choice: Choice | None = None,
    rewiring: Rewiring | None = None,
) -> dict[str, Any]:
    """Continue a prompt.

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
        choice: how tokens are chosen and what ends the text; None is greedy, without stop strings.
        rewiring: offsets on router logits that are fitted to the text while it grows; lossy. None leaves routers alone.

    Returns:
        tokens_per_second (of decoding), predicted (on the CPU, with `hardware`), prefill_seconds, hit_rate, bytes_read,
        peak_memory_bytes, prompt_tokens, token_ids, their text, finish_reason (`stop` or `length`), the report of the
        offloading, and that of `generate_rewired` as `rewired` (None without `rewiring`).

    Raises:
        ValueError: if there is no prompt.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token")
    choice = choice or Choice()
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
        choice.stops,
    )
    model.offload.reset()
    started, rewired = time.perf_counter(), None
    try:
        options = _options(model, prompt_ids, max_new_tokens, live, choice.sampling)
        if rewiring is None:
            model.generate(torch.tensor([list(prompt_ids)], device=model.device), **options)
        else:
            rewired = _rewire(model, prompt_ids, rewiring, max_new_tokens, live, options)
    finally:
        prefill.close()
        if trace_file is not None and live.time_s:
            model.offload.save_trace(trace_file)
    report = model.offload.report()
    is_predicted = hardware is not None and model.offload.lane is None
    predicted = _predicted(model, hardware, prefilled, report) if is_predicted else None
    return {
        **_result(live, started, report),
        "finish_reason": "stop" if live.is_stopped or _is_end(model, live.token_ids[-1]) else "length",
        "prompt_tokens": len(prompt_ids),
        "predicted": predicted,
        "rewired": rewired,
    }


def _is_end(model: Any, token_id: int) -> bool:
    ends = model.generation_config.eos_token_id
    return token_id in (ends if isinstance(ends, list) else [ends])


def _options(
    model: Any, prompt_ids: Sequence[int], max_new_tokens: int, live: LiveText, sampling: Sampling
) -> dict[str, Any]:
    """How `generate` chooses tokens, which go to `live` as they come."""
    request = GenerationRequest(prompt_ids=tuple(prompt_ids), max_new_tokens=max_new_tokens, sampling=sampling)
    # plain greedy needs no sampler: `generate` takes the largest logit itself
    processors = [] if sampling == Sampling() else [SampledToken(Sampler(request))]
    return {
        "attention_mask": torch.ones(1, len(prompt_ids), dtype=torch.long, device=model.device),
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "logits_processor": LogitsProcessorList(processors),
        "stopping_criteria": StoppingCriteriaList([StopsWith(live)]),
        "streamer": live,
    }


def _rewire(
    model: Any,
    prompt_ids: Sequence[int],
    rewiring: Rewiring,
    max_new_tokens: int,
    live: LiveText,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Generate in stretches, before each of which offsets are fitted; gives the report of that."""
    left_out = ("attention_mask", "max_new_tokens")
    given = {name: value for name, value in options.items() if name not in left_out} | {"streamer": Stretches(live)}
    with gradients_pass(model):
        token_1S = torch.tensor([list(prompt_ids)], device=model.device)
        _, report = generate_rewired(model, token_1S, rewiring, max_new_tokens=max_new_tokens, **given)
    live.end()
    return {**report, "exactness": "lossy", "every": rewiring.every, "steps": rewiring.steps}


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
