"""The kernel benchmark's part for a GPU: which cases, in which order, and one layer with everything measured on it."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moe.kernels.decode.rows import MAX_ROWS
from moe.kernels.experts import weights_of
from moe.kernels.launching.launch import Launch
from moe.kernels.launching.tiles import num_processors
from moe.kernels.launching.tuned import chosen_tiles
from moe.kernels.tuning.planned import compile_together, decode_launches, layer_launches, meta_weights
from moe.kernels.tuning.tune import save_tuned, tune
from moe.kernels.weights.weights import ExpertWeights
from routing.traces import RoutingTrace

from .contestants import QUANTISED, Contestant, dense_contestants, quantised_contestant
from .goals import GOAL_TOKENS
from .measured import call_of, require_parity, row_of
from .shapes import ROUTINGS, SHAPES, LayerInput, LayerShape, chosen, experts_module, layer_input, replayed
from .timing import copy_bytes_per_s, peak_bytes, saved_bytes, time_on_gpu

# decode: latency and bandwidth
FEW_TOKENS = (1, 2, 4, 8, 16, 32, 64)
# prefill and training: up to where the goals ask for TFLOP/s
MANY_TOKENS = (512, 4096, 16384, 32768)
# on the decode path, at its end, just past it, and in the class of many rows
PARITY_TOKENS = (1, 64, 512, 8192)
# where quantised weights are timed; they must be right on the path of many tokens too
QUANTISED_TOKENS = (1, 64)
QUANTISED_PARITY_TOKENS = (*QUANTISED_TOKENS, 512)
# one for each row class of the tile table
TUNED_ROWS = (32, 128, 1024)
TRACE = "trace"
# of weights, inputs and routings: the same in every run
SEED = 0
Work = Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]


def gpu_work(
    names: list[str] | None,
    tokens: list[int] | None,
    routings: list[str] | None,
    trace: Path | None,
    tune: bool,
    failed: list[str],
) -> Work:
    """What is to be measured, in order: names and functions that return rows.

    Args:
        names, tokens, routings: the cases; the usual ones where nothing is given.
        trace: a recorded routing that is timed in addition, or None.
        tune: whether to choose tiles first.
        failed: receives a line for each peer that fails.

    Raises:
        ValueError: if a name is unknown.
    """
    if unknown := set(routings or ()) - set(ROUTINGS):
        raise ValueError(f"unknown routings {', '.join(sorted(unknown))}; known are {', '.join(ROUTINGS)}")
    if trace is not None and not names:
        raise ValueError("--trace needs --shape: the layer that the trace was recorded from")
    bandwidth = copy_bytes_per_s()
    layers = {name: GpuLayer(name, layer, bandwidth, failed) for name, layer in chosen(names, SHAPES).items()}
    # what the goals ask comes first, of every layer
    for is_goal in (True, False):
        for name, bench in layers.items():
            if is_goal and tune:
                yield f"{name} tuning", bench.tune
            cases = [
                (num_tokens, kind)
                for num_tokens in tokens or (*MANY_TOKENS[::-1], *FEW_TOKENS[::-1])
                for kind in _routings(num_tokens, routings, trace)
                if (num_tokens in GOAL_TOKENS and kind == "uniform") == is_goal
            ]
            if cases:
                yield f"{name} compiling", lambda b=bench, c=cases: b.compile({num_tokens for num_tokens, _ in c})
                yield f"{name} parity", bench.parity_rows
            for num_tokens, kind in cases:
                yield f"{name} T={num_tokens} {kind}", lambda b=bench, t=num_tokens, k=kind: b.rows(t, k, trace)
            bench.release()
            torch.cuda.empty_cache()


def _routings(num_tokens: int, asked: list[str] | None, trace: Path | None) -> list[str]:
    default = ["uniform"] if num_tokens not in (1, 4096) else ["uniform", "zipf", "one-hot"]
    return (asked or default) + ([] if trace is None else [TRACE])


class GpuLayer:
    """One layer on the GPU: its weights, made when first needed, and everything measured with them.

    A peer that fails (a shape that it does not know, memory) is named in `failed`; ours must not fail.
    """

    def __init__(
        self, name: str, layer: LayerShape, copy_bytes_per_s: float, failed: list[str], device: str = "cuda"
    ) -> None:
        self.name, self.layer, self.copy_bytes_per_s, self.failed = name, layer, copy_bytes_per_s, failed
        self.device = device
        self._experts: nn.Module | None = None
        self._quantised: list[Contestant] | None = None
        self._is_right = False

    @property
    def experts(self) -> nn.Module:
        """The dense weights."""
        if self._experts is None:
            self._experts = experts_module(self.layer, torch.bfloat16, self.device, SEED)
            self._experts._is_expert_parallel = True
        return self._experts

    @property
    def quantised(self) -> list[Contestant]:
        """Our kernels with each format that fits the layer."""
        if self._quantised is None:
            self._quantised = [quantised_contestant(self.experts, name) for name in self.formats]
        return self._quantised

    @property
    def formats(self) -> tuple[str, ...]:
        """Of quantised weights, those that fit the layer."""
        is_in_groups = self.layer.width % 128 == 0 and self.layer.features % 128 == 0
        return QUANTISED if is_in_groups else ("int8", "fp8")

    def release(self) -> None:
        """Free the memory; weights are drawn again when they are next needed."""
        self._experts = self._quantised = None

    def given(self, num_tokens: int, routing: str, trace: Path | None = None) -> LayerInput:
        """Tokens with a routing by name; of `trace` where the name is `TRACE`."""
        generator = np.random.default_rng(SEED)
        if routing != TRACE:
            ids = ROUTINGS[routing](num_tokens, self.layer, generator)
        else:
            ids = replayed(RoutingTrace.load(trace), num_tokens, self.layer)
        return layer_input(ids, self.layer, torch.bfloat16, self.device, generator)

    def contestants(self, num_tokens: int) -> list[Contestant]:
        """The contestants that are timed at this number of tokens, ours first."""
        found = dense_contestants(num_tokens * self.layer.top_k, self.layer.expert_bytes(2), num_tokens)
        return found + self.quantised if num_tokens in QUANTISED_TOKENS else found

    def compile(self, tokens: Collection[int]) -> list[dict[str, Any]]:
        """All kernels of these cases and of the parity check at once; one by one they would take minutes."""
        sizes = (self.layer.width, self.layer.features, self.layer.num_experts, torch.bfloat16)
        launches = self._launches(meta_weights(*sizes), {*tokens, *PARITY_TOKENS})
        few = {*QUANTISED_PARITY_TOKENS, *tokens} & {*QUANTISED_PARITY_TOKENS, *QUANTISED_TOKENS}
        for name in self.formats:
            launches += self._launches(meta_weights(*sizes, quantised=name), few)
        compile_together(launches)
        return []

    def _launches(self, weights: ExpertWeights, tokens: Collection[int]) -> list[Launch]:
        device, dtype, top_k = torch.device(self.device), torch.bfloat16, self.layer.top_k
        is_dense = isinstance(weights.up, torch.Tensor)
        found = []
        for num_tokens in tokens:
            num_rows = num_tokens * top_k
            tiles = chosen_tiles(device, dtype, num_rows, weights)
            if num_rows <= MAX_ROWS:
                found += decode_launches(weights, num_tokens, top_k, dtype, num_processors(device))
            else:
                found += layer_launches(weights, num_tokens, top_k, dtype, tiles, trains=False)
            if is_dense and (num_tokens in PARITY_TOKENS or num_tokens >= MANY_TOKENS[0]):
                found += layer_launches(weights, num_tokens, top_k, dtype, tiles, trains=True)
        return found

    def parity_rows(self) -> list[dict[str, Any]]:
        """Our kernels, on every path and with every format, must be right before anything is timed."""
        if self._is_right:
            return []
        for num_tokens in PARITY_TOKENS:
            self._require_parity(self.contestants(num_tokens)[:1], num_tokens)
        for num_tokens in QUANTISED_PARITY_TOKENS:
            self._require_parity(self.quantised, num_tokens)
        self._is_right = True
        return []

    def _require_parity(self, ours: list[Contestant], num_tokens: int) -> None:
        for routing in ("uniform", "one-hot"):
            given = self.given(num_tokens, routing)
            given.expert_TK[num_tokens // 2, 0] = self.layer.num_experts
            require_parity(ours, self.experts, given, f"{self.name} T={num_tokens} {routing}")

    def tune(self) -> list[dict[str, Any]]:
        """Choose and keep tiles for every class of rows per expert."""
        weights = weights_of(self.experts)
        for rows_per_expert in TUNED_ROWS:
            num_tokens = rows_per_expert * self.layer.num_experts // self.layer.top_k
            given = self.given(num_tokens, "uniform")
            tiles = tune(weights, given.x_TD, given.expert_TK, given.combine_TK)
            save_tuned(torch.cuda.get_device_name(), torch.bfloat16, rows_per_expert, weights, tiles)
        return []

    def rows(self, num_tokens: int, routing: str, trace: Path | None = None) -> list[dict[str, Any]]:
        """Every contestant's times, forward and, where there are many tokens, forward and backward."""
        given = self.given(num_tokens, routing, trace)
        rows = []
        for one in self.contestants(num_tokens):
            for is_training in (False, True) if one.trains and num_tokens >= MANY_TOKENS[0] else (False,):
                try:
                    rows.append(self._timed(one, given, num_tokens, routing, is_training))
                except Exception as error:
                    if one.name.startswith("expertier"):
                        raise
                    lines = str(error).splitlines() or [type(error).__name__]
                    self.failed.append(f"{one.name}, {self.name} T={num_tokens} {routing}: {lines[0]}")
        return rows

    def _timed(
        self, one: Contestant, given: LayerInput, num_tokens: int, routing: str, is_training: bool
    ) -> dict[str, Any]:
        call = call_of(one, self.experts, given, is_training)
        found = time_on_gpu(call, can_be_captured=one.can_be_captured)
        row = row_of(self.name, self.layer, num_tokens, routing, is_training, one.name, found)
        moved = given.num_active * self.layer.expert_bytes(one.weight_bytes)
        row["of_copy_bandwidth"] = round(moved / found.median_s / self.copy_bytes_per_s, 3)
        row["peak_mib"] = round(peak_bytes(call) / 2**20, 1)
        row["is_graph"] = found.is_graph
        row["saved_of_least"] = None
        if is_training:
            x_TD, combine_TK = given.x_TD.detach().requires_grad_(), given.combine_TK.detach().requires_grad_()
            weights = list(self.experts.parameters())
            saved = saved_bytes(lambda: one.compute(self.experts, x_TD, given.expert_TK, combine_TK), weights)
            row["saved_of_least"] = round(saved / self.layer.least_saved_bytes(num_tokens, x_TD.element_size()), 4)
        return row
