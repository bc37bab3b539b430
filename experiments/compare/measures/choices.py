"""What a trained router is like: balance, sharpness, how layers relate, how well its experts cache.

Shapes: T tokens, L MoE layers, K slots, E FFN experts, R routable experts, B sequences.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe import MoEForCausalLM
from offload import simulate
from routing import MarginalStats, RouterStats, Routing, RoutingTrace
from routing.traces import EMPTY, longest_sequence, segment_routing

from ...train.corpus import Corpus, windows
from ...train.metrics import balance_metrics
from .flops import Usage, measured_usage, parameters, token_flops
from .hidden_units import hidden_metrics

SEGMENT = 16
"""Tokens per window of the segment routing performance; short, so that a sequence of 32 tokens has some."""
CACHED_SHARE = 0.25
"""Share of the experts that the simulated cache holds: few enough that it misses, more than one token visits."""
ROUTING_METRICS = (
    "max_vio",
    "dead_experts",
    "router_entropy",
    "inner_balance",
    "outer_balance",
    "mutual_information",
    "lru_hit_rate",
    "srp",
)


@torch.no_grad()
def router_metrics(
    model: MoEForCausalLM, corpus: Corpus, *, sequence_length: int, max_tokens: int, batch_size: int
) -> dict[str, float | None]:
    """Everything `compare` tabulates about a trained model, on held-out text.

    Args:
        model: in evaluation mode.
        corpus: its held-out part is read.
        sequence_length, batch_size: S and B of a forward pass.
        max_tokens: bound on the tokens that are read, from the start of the held-out part on.

    Returns:
        By name; see `summary.METRICS` for what each one is. None where the architecture has no such thing.
    """
    rows = windows(corpus.held_out, min(sequence_length, len(corpus.held_out)))
    rows = rows[: max(1, max_tokens // rows.shape[1])]
    outputs, foresight = [], []
    for start in range(0, len(rows), batch_size):
        token_BS = torch.from_numpy(rows[start : start + batch_size].astype("int64"))
        with _router_inputs(model) as seen:
            outputs.append(model(token_BS.to(model.device), use_cache=False))
        foresight.append(predictability(seen))
    usage = measured_usage(outputs, rows.size)
    flops = token_flops(model, usage, sequence_length=rows.shape[1])
    true_load = _true_load(model, usage, outputs[0].router_stats)
    count = parameters(model, true_load)
    found = {
        "true_load": true_load,
        **_routing_metrics(model, [output.router_stats or [] for output in outputs], rows.shape),
        "predictability": float(np.mean(foresight)),
        **hidden_metrics(model, torch.from_numpy(rows.astype("int64")).to(model.device)),
        "flops_per_token": flops.total,
        "expert_flops_per_token": flops.experts,
        "router_flops_per_token": flops.router,
        "parameters": count["total"],
        "router_parameters": count["router"],
        "active_parameters": count["active"],
    }
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _routing_metrics(
    model: MoEForCausalLM, calls: list[list[RouterStats]], shape_BS: tuple[int, ...]
) -> dict[str, float]:
    """What routers chose; NaN where a model has none, or where not all of them saw all tokens."""
    num_tokens = shape_BS[0] * shape_BS[1]
    if not calls[0]:
        return dict.fromkeys(ROUTING_METRICS, math.nan)
    E = calls[0][0].num_experts
    load_LE = np.stack(
        [sum(call.kept_R for call in router)[:E].numpy(force=True) for router in zip(*calls, strict=True)]
    )
    entropy = float(np.mean([[float(layer.entropy) for layer in call] for call in calls]))
    balance = balance_metrics(entropy, load_LE)
    found = dict.fromkeys(ROUTING_METRICS, math.nan) | {
        name: balance[name] for name in ("max_vio", "dead_experts", "router_entropy")
    }
    if any(isinstance(stats, MarginalStats) for stats in calls[0]):
        return found
    found |= sharpness(calls, model.config.num_experts_per_tok)
    layered = [_by_layer(model, call) for call in calls]
    if all(stats.num_tokens == call[0].num_tokens for call in calls for stats in call):
        found["mutual_information"] = mutual_information(calls)
    rows = [sum(len(stats.kept.expert_TK) for stats in layer) for layer in zip(*layered, strict=True)]
    if rows == [num_tokens] * len(rows):
        trace = trace_of(layered, shape_BS, E, source=model.config.router)
        cached = max(1, round(CACHED_SHARE * E))
        found["lru_hit_rate"] = simulate(trace, cached, policies=("lru",))["lru"].hit_rate
        found["srp"] = segment_routing_performance(trace, SEGMENT)
    return found


def _by_layer(model: MoEForCausalLM, call: list[RouterStats]) -> list[RouterStats]:
    """One per routed layer, which is one per bank of experts: the slots of all calls of a token beside each other."""
    calls, found = iter(call), []
    for layer in model.model.moe_layers:
        own = [next(calls) for _ in layer.routers]
        # a gate that serves all iterations of a chain has their rows below each other
        repeats = getattr(layer, "iterations", 1) // len(own)
        kept = [part for stats in own for part in stats.kept.split(repeats)]
        found.append(replace(own[0], kept=Routing.beside(kept)))
    return found


def sharpness(calls: list[list[RouterStats]], top_k: int) -> dict[str, float]:
    """Inner balance: median ratio of the best to the second score; outer balance: mean sum of the K best.

    Source: Qiu et al. 2024 (RMoE), arXiv:2408.06793, section 5.
    """
    ratios, sums = [], []
    for call in calls:
        for layer in call:
            best = layer.probability_TR.sort(dim=-1, descending=True).values.cpu()
            ratios.append(best[:, 0] / best[:, min(1, best.shape[1] - 1)].clamp_min(1e-30))
            sums.append(best[:, :top_k].sum(dim=-1))
    return {"inner_balance": float(torch.cat(ratios).median()), "outer_balance": float(torch.cat(sums).mean())}


def mutual_information(calls: list[list[RouterStats]]) -> float:
    """Nats that a token's first choice at a layer tells about its first choice at the next, mean over layers."""
    first_LT = np.concatenate(
        [np.stack([layer.probability_TR.argmax(dim=-1).cpu().numpy() for layer in call]) for call in calls], axis=1
    )
    R = calls[0][0].probability_TR.shape[1]
    pairs = pairwise(first_LT)
    return float(np.mean([_information(np.bincount(a * R + b, minlength=R * R).reshape(R, R)) for a, b in pairs]))


def predictability(seen: list[tuple[Any, Tensor, Any, Any, Any]]) -> float:
    """Share of a router's experts that it would already have named from the input of the router before it.

    Pre-gated layers score 1 where the plan is in the carry. `seen` holds, per call, router, input, outgoing carry,
    context and routing.
    """
    overlaps = []
    for (_, x_TD, carry, context, _), (router, own_TD, _, _, routing) in pairwise(seen):
        if len(x_TD) != len(own_TD):
            continue
        guess, _, _ = router(x_TD, carry, context)
        is_used_TR, is_guessed_TR = _used(routing), _used(guess)
        overlaps.append(float((is_used_TR & is_guessed_TR).sum() / is_used_TR.sum().clamp_min(1)))
    return float(np.mean(overlaps)) if overlaps else float("nan")


def trace_of(calls: list[list[RouterStats]], shape_BS: tuple[int, ...], num_experts: int, source: str) -> RoutingTrace:
    """The FFN experts that were computed, as a routing trace; variable numbers of experts are padded with -1."""
    K = max(layer.kept.expert_TK.shape[1] for call in calls for layer in call)
    expert_TLK = np.concatenate([np.stack([_padded(layer, K) for layer in call], axis=1) for call in calls])
    B, S = shape_BS
    return RoutingTrace(
        expert_TLK=expert_TLK,
        sequence_T=np.repeat(np.arange(B, dtype=np.int32), S),
        metadata={"num_experts": num_experts, "source": source},
    )


def segment_routing_performance(trace: RoutingTrace, window: int) -> float:
    """Best F1 of keeping, for each window of tokens, the experts used at least so often in it; mean over layers, and 0
    where no sequence is that long.

    Args:
        trace: rows in order; windows do not cross sequences.
        window: m tokens.

    Source: Liang et al. 2025, arXiv:2505.16056, appendix C.
    """
    if longest_sequence(trace) < window:
        return 0.0
    return float(np.mean([segment_routing(trace, window, layer).f1 for layer in range(trace.num_layers)]))


def _padded(layer: RouterStats, K: int) -> NDArray[np.int16]:
    expert_TK = layer.kept.expert_TK.cpu().numpy()
    expert_TK = np.where(expert_TK < layer.num_experts, expert_TK, EMPTY).astype(np.int16)
    return np.pad(expert_TK, ((0, 0), (0, K - expert_TK.shape[1])), constant_values=EMPTY)


def _used(routing: Any) -> Tensor:
    """bool [T, R]."""
    used = torch.zeros(
        len(routing.expert_TK), routing.num_routable + 1, dtype=torch.bool, device=routing.weight_TK.device
    )
    return used.scatter(1, routing.expert_TK, True)[:, : routing.num_routable]


def _information(count: NDArray[np.int64]) -> float:
    joint = count / count.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


def _true_load(model: MoEForCausalLM, usage: Usage, call: list[RouterStats]) -> float:
    """FFN experts per token and routed layer, all iterations of a layer together."""
    if not call:
        return math.nan
    loads = zip(usage.loads, call, strict=True)
    per_router = [
        float(stats.true_load if isinstance(stats, MarginalStats) else load_R[: stats.num_experts].sum())
        for load_R, stats in loads
    ]
    return sum(per_router) / len(model.model.moe_layers)


@contextmanager
def _router_inputs(model: MoEForCausalLM) -> Iterator[list[tuple[Any, Tensor, Any, Any, Any]]]:
    """Collects what each router read and returned during a call, in the order of the calls."""
    seen: list[tuple[Any, Tensor, Any, Any, Any]] = []

    def note(module: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        routing, carry, _ = outputs
        seen.append((module, inputs[0], carry, inputs[2], routing))

    handles = [router.register_forward_hook(note) for router in model.model.routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
