"""`expertier bench kernels`: the expert kernels against every peer that can run here, parity first."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from .kernel_contestants import Contestant
    from .kernel_shapes import LayerInput, LayerShape

FEW_TOKENS = (1, 2, 4, 8, 16, 32, 64)
MANY_TOKENS = (512, 4096, 16384, 32768)
PARITY_TOKENS = (1, 64, 512, 8192)
# where quantised weights are timed; they must be right on the path of many tokens too
QUANTISED_TOKENS = (1, 64)
QUANTISED_PARITY_TOKENS = (*QUANTISED_TOKENS, 512)
CPU_TOKENS = (1, 64, 512)
# one for each row class of the tile table
TUNED_ROWS = (32, 128, 1024)
SEED = 0
NO_GPU = "no GPU here: the Triton kernels stay unmeasured; what follows is the path that a CPU takes"


def bench_kernels(
    shape: Annotated[list[str] | None, typer.Option(help="A layer by name; repeat for more; all without it.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of tokens; the usual ones without it.")
    ] = None,
    routing: Annotated[list[str] | None, typer.Option(help="uniform, zipf or one-hot; repeat for more.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Also replay this trace; needs --shape.")] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Stop measuring after so long, and say what is missing.")
    ] = 480.0,
    tune: Annotated[
        bool, typer.Option("--tune", help="First choose tiles by measuring (minutes), and keep them.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the table as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Save a record.")] = False,
) -> None:
    """Time MoE layers: forward, forward and backward, peak memory; refuses to print a time when parity is red.

    Example: `expertier bench kernels --shape qwen3-30b-a3b --tokens 1 --tokens 32768`
    """
    import torch

    has_gpu = torch.cuda.is_available()
    console = Console()
    if not has_gpu:
        console.print(NO_GPU, highlight=False)
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    failed: list[str] = []
    work = _on_gpu(shape, tokens, routing, trace, tune, failed) if has_gpu else _on_cpu(shape, tokens)
    deadline = time.monotonic() + seconds
    try:
        for what, measure in work:
            if time.monotonic() > deadline:
                missing.append(what)
                continue
            with console.status(what):
                rows += measure()
    except KeyboardInterrupt:
        console.print("interrupted; what was measured follows")
    _show(console, rows, has_gpu)
    if missing:
        console.print(f"not measured, out of time: {', '.join(missing)}", highlight=False)
    for line in failed:
        console.print(f"not measured, failed: {line}", highlight=False)
    _keep(rows, missing, failed, json_file, record, has_gpu)


Work = Iterator[tuple[str, Any]]


def _on_cpu(names: list[str] | None, tokens: list[int] | None) -> Work:
    import torch

    from .kernel_shapes import CPU_SHAPES, chosen

    for name, layer in chosen(names, CPU_SHAPES).items():
        for dtype in (torch.float32, torch.bfloat16):
            for num_tokens in tokens or CPU_TOKENS:
                yield (
                    f"{name} {dtype} T={num_tokens}",
                    lambda n=name, s=layer, d=dtype, t=num_tokens: _cpu_rows(n, s, d, t),
                )


def _cpu_rows(name: str, layer: "LayerShape", dtype: Any, num_tokens: int) -> list[dict[str, Any]]:
    import numpy as np
    from transformers.integrations.moe import grouped_mm_experts_forward

    from moe import grouped_experts

    from .kernel_contestants import Contestant
    from .kernel_shapes import experts_module, layer_input, uniform
    from .kernel_timing import summary, time_in_turns

    generator = np.random.default_rng(SEED)
    experts = experts_module(layer, dtype, "cpu", SEED)
    given = layer_input(uniform(num_tokens, layer, generator), layer, dtype, "cpu", generator)
    contestants = [
        Contestant("transformers grouped_mm", grouped_mm_experts_forward),
        Contestant("expertier", grouped_experts),
    ]
    _require_parity(contestants, experts, given, f"{name} {dtype} T={num_tokens}")
    rows = []
    for is_training in (False, True):
        calls = {one.name: _call(one, experts, given, is_training) for one in contestants}
        samples_s = time_in_turns(calls)
        base_s = np.array(samples_s["transformers grouped_mm"])
        routing = f"uniform {dtype}".replace("torch.", "")
        rows += [
            _row(name, layer, num_tokens, routing, is_training, who, summary(found_s, False))
            | {"ratio_to_grouped_mm": round(float(np.median(np.array(found_s) / base_s)), 3)}
            for who, found_s in samples_s.items()
        ]
    return rows


def _on_gpu(
    names: list[str] | None,
    tokens: list[int] | None,
    routings: list[str] | None,
    trace: Path | None,
    tune: bool,
    failed: list[str],
) -> Work:
    import torch

    from .kernel_shapes import ROUTINGS, SHAPES, chosen
    from .kernel_timing import copy_bytes_per_s

    if unknown := set(routings or ()) - set(ROUTINGS):
        raise ValueError(f"unknown routings {', '.join(sorted(unknown))}; known are {', '.join(ROUTINGS)}")
    if trace is not None and not names:
        raise ValueError("--trace needs --shape: the layer that the trace was recorded from")
    bandwidth = copy_bytes_per_s()
    for name, layer in chosen(names, SHAPES).items():
        bench = _GpuLayer(name, layer, bandwidth, failed)
        yield f"{name} parity", bench.parity_rows
        if tune:
            yield f"{name} tuning", bench.tune
        for num_tokens in tokens or (*MANY_TOKENS[::-1], *FEW_TOKENS):
            default = ("uniform",) if num_tokens not in (1, 4096) else ("uniform", "zipf", "one-hot")
            for routing in routings or default:
                yield f"{name} T={num_tokens} {routing}", lambda b=bench, t=num_tokens, r=routing: b.rows(t, r)
            if trace is not None:
                yield f"{name} T={num_tokens} trace", lambda b=bench, t=num_tokens: b.rows(t, "trace", trace)
        bench.release()
        torch.cuda.empty_cache()


class _GpuLayer:
    """One layer on the GPU: its weights, made when first needed, and everything measured with them.

    A peer that fails (a shape that it does not know, memory) is named in `failed`; ours must not fail.
    """

    def __init__(
        self, name: str, layer: "LayerShape", copy_bytes_per_s: float, failed: list[str], device: str = "cuda"
    ) -> None:
        self.name, self.layer, self.copy_bytes_per_s, self.failed = name, layer, copy_bytes_per_s, failed
        self.device = device
        self._experts: nn.Module | None = None
        self._quantised: list[Contestant] | None = None

    @property
    def experts(self) -> "nn.Module":
        import torch

        from .kernel_shapes import experts_module

        if self._experts is None:
            self._experts = experts_module(self.layer, torch.bfloat16, self.device, SEED)
            self._experts._is_expert_parallel = True
        return self._experts

    @property
    def quantised(self) -> "list[Contestant]":
        """Our kernels with each format that fits the layer."""
        from .kernel_contestants import QUANTISED, quantised_contestant

        if self._quantised is None:
            is_in_groups = self.layer.width % 128 == 0 and self.layer.features % 128 == 0
            formats = QUANTISED if is_in_groups else ("int8", "fp8")
            self._quantised = [quantised_contestant(self.experts, name) for name in formats]
        return self._quantised

    def release(self) -> None:
        self._experts = self._quantised = None

    def given(self, num_tokens: int, routing: str, trace: Path | None = None) -> "LayerInput":
        import numpy as np
        import torch

        from routing.traces import RoutingTrace

        from .kernel_shapes import ROUTINGS, layer_input, replayed

        generator = np.random.default_rng(SEED)
        if trace is None:
            ids = ROUTINGS[routing](num_tokens, self.layer, generator)
        else:
            ids = replayed(RoutingTrace.load(trace), num_tokens, self.layer)
        return layer_input(ids, self.layer, torch.bfloat16, self.device, generator)

    def contestants(self, num_tokens: int) -> "list[Contestant]":
        from .kernel_contestants import dense_contestants

        found = dense_contestants(num_tokens * self.layer.top_k, self.layer.expert_bytes(2), num_tokens)
        return found + self.quantised if num_tokens in QUANTISED_TOKENS else found

    def parity_rows(self) -> list[dict[str, Any]]:
        """Our kernels, on every path and with every format, must be right before anything is timed."""
        for num_tokens in PARITY_TOKENS:
            self._require_parity(self.contestants(num_tokens)[:1], num_tokens)
        for num_tokens in QUANTISED_PARITY_TOKENS:
            self._require_parity(self.quantised, num_tokens)
        return []

    def _require_parity(self, ours: "list[Contestant]", num_tokens: int) -> None:
        for routing in ("uniform", "one-hot"):
            given = self.given(num_tokens, routing)
            given.expert_TK[num_tokens // 2, 0] = self.layer.num_experts
            _require_parity(ours, self.experts, given, f"{self.name} T={num_tokens} {routing}")

    def tune(self) -> list[dict[str, Any]]:
        import torch

        from moe.kernels.experts import weights_of
        from moe.kernels.tune import save_tuned, tune

        for rows_per_expert in TUNED_ROWS:
            num_tokens = rows_per_expert * self.layer.num_experts // self.layer.top_k
            given = self.given(num_tokens, "uniform")
            tiles = tune(weights_of(self.experts), given.x_TD, given.expert_TK, given.combine_TK)
            save_tuned(torch.cuda.get_device_name(), torch.bfloat16, rows_per_expert, tiles)
        return []

    def rows(self, num_tokens: int, routing: str, trace: Path | None = None) -> list[dict[str, Any]]:
        given = self.given(num_tokens, routing, trace)
        rows = []
        for one in self.contestants(num_tokens):
            for is_training in (False, True) if one.trains and num_tokens >= MANY_TOKENS[0] else (False,):
                try:
                    rows.append(self._timed(one, given, num_tokens, routing, is_training))
                except (RuntimeError, ValueError, TypeError, ImportError) as error:
                    if one.name.startswith("expertier"):
                        raise
                    lines = str(error).splitlines() or [type(error).__name__]
                    self.failed.append(f"{one.name}, {self.name} T={num_tokens} {routing}: {lines[0]}")
        return rows

    def _timed(
        self, one: "Contestant", given: "LayerInput", num_tokens: int, routing: str, is_training: bool
    ) -> dict[str, Any]:
        from .kernel_timing import peak_bytes, time_on_gpu

        call = _call(one, self.experts, given, is_training)
        found = time_on_gpu(call)
        row = _row(self.name, self.layer, num_tokens, routing, is_training, one.name, found)
        moved = given.num_active * self.layer.expert_bytes(one.weight_bytes)
        row["of_copy_bandwidth"] = round(moved / found.median_s / self.copy_bytes_per_s, 3)
        row["peak_mib"] = round(peak_bytes(call) / 2**20, 1)
        row["is_graph"] = found.is_graph
        return row


def _call(contestant: Any, experts: "nn.Module", given: "LayerInput", is_training: bool) -> Any:
    """What is timed: the layer alone, or with its backward pass to tokens, combine weights and expert weights."""
    import torch

    if not is_training:

        def forward() -> Any:
            with torch.no_grad():
                return contestant.compute(experts, given.x_TD, given.expert_TK, given.combine_TK)

        return forward
    x_TD, combine_TK = (tensor.detach().requires_grad_() for tensor in (given.x_TD, given.combine_TK))
    leaves = (x_TD, combine_TK, *experts.parameters())
    cotangent_TD = torch.ones_like(given.x_TD)

    def forward_and_backward() -> Any:
        y_TD = contestant.compute(experts, x_TD, given.expert_TK, combine_TK)
        return torch.autograd.grad(y_TD, leaves, cotangent_TD)

    return forward_and_backward


def _require_parity(contestants: list[Any], experts: "nn.Module", given: "LayerInput", what: str) -> None:
    from .kernel_contestants import BOUNDS, truth, worst_error

    bound = BOUNDS[given.x_TD.dtype]
    for weights, alike in itertools.groupby(contestants, key=lambda one: one.weights):
        exact = truth(experts, given, weights)
        for one in alike:
            error = worst_error(one, experts, given, exact)
            if not error <= bound:
                raise RuntimeError(
                    f"parity is red, so no time is printed: {one.name} at {what} is off by {error:.2e} (relative norm) "
                    f"from float32; at most {bound:.0e} is allowed"
                )


def _row(
    name: str, layer: "LayerShape", num_tokens: int, routing: str, is_training: bool, who: str, times: Any
) -> dict[str, Any]:
    flops = layer.flops(num_tokens) * (3 if is_training else 1)
    return {
        "shape": name,
        "tokens": num_tokens,
        "routing": routing,
        "pass": "forward+backward" if is_training else "forward",
        "variant": who,
        "p50_us": round(times.median_s * 1e6, 1),
        "p20_us": round(times.p20_s * 1e6, 1),
        "p80_us": round(times.p80_s * 1e6, 1),
        "samples": times.samples,
        "tflops_per_s": round(flops / times.median_s / 1e12, 3),
    }


def _show(console: Console, rows: list[dict[str, Any]], has_gpu: bool) -> None:
    if not rows:
        return
    table = Table(title="MoE layers, parity checked" + ("; cold cache, graph replay" if has_gpu else "; A B A B"))
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=max(console.width, 200)).print(table)


def _keep(
    rows: list[dict[str, Any]],
    missing: list[str],
    failed: list[str],
    json_file: Path | None,
    record: bool,
    has_gpu: bool,
) -> None:
    from routing.traces import write_json

    from .record import save_record

    if json_file is not None:
        write_json(json_file, {"rows": rows, "not_measured": missing, "failed": failed})
    if record and rows:
        config = {"not_measured": missing, "failed": failed, "cold_cache": has_gpu, "graph_replay": has_gpu}
        folder = save_record("kernels-gpu" if has_gpu else "kernels-cpu", rows, config=config, seed=SEED)
        typer.echo(f"record: {folder}")
