"""`expertier demo`: the three jobs on one model, from training text to a placement, in minutes and without a GPU."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import offload
from placement import Cluster, Plan, Problem, score, solve
from routing import RoutingTrace
from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ..evidence.resident import load_resident
from ..train.corpus import Corpus, load_corpus, windows
from ..train.loop import held_out_rows
from ..train.metrics import read_log
from ..train.presets import TrainConfig, preset
from ..train.torch_run import measure_step_s, train
from .folder import expect_free
from .ngram import ngram_bits_per_byte
from .page import write_page
from .result import DemoResult, OffloadedRun, Placements, Yardsticks

# most of the demo's time; `--train-seconds` changes it
TRAIN_SECONDS = 240.0
FEWEST_STEPS, MOST_STEPS = 150, 600
"""Below, the model does not beat a bigram; above, the held-out loss of the standard library hardly falls."""
OVERTIME = 1.4
"""Training ends early at this multiple of its time: a machine that others use can slow down after it was measured."""
# about a line of text, continued by three; not tuned
PROMPT_BYTES, NEW_TOKENS, TEMPERATURE = 64, 192, 0.7
TRACE_SEQUENCES, TRACE_LENGTH = 24, 256
"""6,144 tokens: a plan solved on half of them carries over to the other half, and recording takes seconds."""
# the smallest cluster on which node and GPU traffic differ
CLUSTER_NODES, CLUSTER_GPUS = 2, 4
POLICIES = ("lru", "lfu", "belady")


def run_demo(out: Path, *, data: str | None = None, train_seconds: float = TRAIN_SECONDS) -> Path:
    """Train, offload, record, simulate and place; returns the finished report.

    Args:
        out: a folder that does not exist yet or is empty.
        data: text to train on; the standard library's sources without it.
        train_seconds: wall time that training may take, about.

    Raises:
        ValueError: if `out` is in use, or the text cannot be read.
        RuntimeError: if the trained model does not beat a bigram, or the offloaded output differs from the resident.
    """
    expect_free(out)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(plain_console(stderr=True))
    corpus = stages.run("read the text", lambda: load_corpus(data))
    stages.note(f"{corpus.source}: {corpus.summary}")
    config = stages.run("measure this machine", lambda: _fit_steps(corpus, train_seconds))
    yardsticks = stages.run("count bigrams and trigrams", lambda: _yardsticks(corpus, config))
    trained = stages.run(
        f"train for {config.steps} steps",
        lambda: train(config, corpus, out / "model", stop_after_s=OVERTIME * train_seconds),
    )
    _expect(
        trained.held_out_bits_per_byte < yardsticks.bigram,
        f"the model reached {trained.held_out_bits_per_byte:.3f} bits per byte, not below the bigram's "
        f"{yardsticks.bigram:.3f}; this machine was too slow or too busy, try a longer --train-seconds",
    )
    offloaded = stages.run("generate with a quarter of the experts in RAM", lambda: _offload(out / "model", corpus))
    _expect(offloaded.same_tokens and offloaded.same_logits, "the offloaded output differs from the resident one")
    trace = stages.run("record the routing", lambda: _record(out, corpus))
    hit_rates = stages.run("simulate caches", lambda: _simulate(trace))
    placements = stages.run("place the experts on a cluster", lambda: _place(trace, out))
    result = DemoResult(
        config=config,
        trained=trained,
        log=read_log(out / "model" / "metrics.jsonl"),
        yardsticks=yardsticks,
        offloaded=offloaded,
        trace=trace,
        hit_rates=hit_rates,
        placements=placements,
        seconds=stages.seconds,
    )
    write_json(out / "summary.json", summary(result))
    return write_page(out / "report.html", result)


class Stages:
    """Runs one stage after another, says what it does and keeps how long it took."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console

    def note(self, text: str) -> None:
        """Say something about the stage that is done."""
        self._console.print(f"  {text}", highlight=False, markup=False)

    def run(self, name: str, stage: Callable[[], Any]) -> Any:
        """The stage's result."""
        self._console.print(f"{name} ...", style="bold")
        start = time.perf_counter()
        result = stage()
        self.seconds[name] = time.perf_counter() - start
        return result


def summary(result: DemoResult) -> dict[str, Any]:
    """The demo's numbers, JSON-serialisable."""
    offloaded = result.offloaded
    return {
        "held_out_bits_per_byte": result.trained.held_out_bits_per_byte,
        "bigram_bits_per_byte": result.yardsticks.bigram,
        "trigram_bits_per_byte": result.yardsticks.trigram,
        "steps": result.trained.steps,
        "same_tokens": offloaded.same_tokens,
        "same_logits": offloaded.same_logits,
        "cache_experts": offloaded.cache_experts,
        "hit_rate": offloaded.report["hit_rate"],
        "hit_rates": result.hit_rates,
        "placement": {name: found.to_json() for name, found in result.placements.scores.items()},
        "seconds": result.seconds,
    }


def _expect(is_met: bool, complaint: str) -> None:
    if not is_met:
        raise RuntimeError(complaint)


def _yardsticks(corpus: Corpus, config: TrainConfig) -> Yardsticks:
    """On the same bytes that the model is scored on."""
    scored = held_out_rows(corpus, config).ravel()
    bigram, trigram = (ngram_bits_per_byte(corpus.train, scored, order) for order in (2, 3))
    return Yardsticks(bigram=bigram, trigram=trigram)


def _fit_steps(corpus: Corpus, train_seconds: float) -> TrainConfig:
    """The demo preset with as many steps as this machine does in the time."""
    config = preset("demo")
    steps = int(train_seconds / measure_step_s(config, corpus))
    return replace(config, steps=min(MOST_STEPS, max(FEWEST_STEPS, steps)))


def _offload(model_dir: Path, corpus: Corpus) -> OffloadedRun:
    prompt = torch.from_numpy(corpus.held_out[:PROMPT_BYTES].astype(np.int64))[None]
    resident = load_resident(model_dir, experts_implementation="grouped_mm")  # whose bits offloading keeps
    cache_experts = max(resident.config.num_experts // 4, 1)
    offloaded = offload.load(model_dir, cache_experts=cache_experts, io="cached")  # the files were just written
    resident_ids, resident_logits, _ = _generate(resident, prompt)
    token_ids, logits, seconds = _generate(offloaded, prompt)
    report = offloaded.offload.report()
    offloaded.offload.close()
    return OffloadedRun(
        cache_experts=cache_experts,
        same_tokens=torch.equal(resident_ids, token_ids),
        same_logits=torch.equal(resident_logits, logits),
        prompt=_text(token_ids[0, :PROMPT_BYTES]),
        generated=_text(token_ids[0, PROMPT_BYTES:]),
        report=report,
        tokens_per_second=(token_ids.shape[1] - PROMPT_BYTES) / seconds,
    )


def _text(token_ids: torch.Tensor) -> str:
    return bytes(token_ids.tolist()).decode("utf-8", "replace")


def _generate(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    torch.manual_seed(0)
    start = time.perf_counter()
    output = model.generate(
        prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=TEMPERATURE,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, torch.stack(output.logits), time.perf_counter() - start


@torch.no_grad()
def _record(out: Path, corpus: Corpus) -> RoutingTrace:
    model = offload.load(out / "model", record_trace=True)
    for row in windows(corpus.held_out, TRACE_LENGTH)[:TRACE_SEQUENCES]:
        model(torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    model.offload.save_trace(out / "routing.npz")
    model.offload.close()
    return RoutingTrace.load(out / "routing.npz")


def _simulate(trace: RoutingTrace) -> dict[str, list[float]]:
    """Hit rate per policy at 1..E slots per layer."""
    sizes = range(1, trace.num_experts + 1)
    results = [offload.simulate(trace, size, policies=POLICIES) for size in sizes]
    return {policy: [result[policy].hit_rate for result in results] for policy in POLICIES}


def _place(trace: RoutingTrace, out: Path) -> Placements:
    """Plan on the first half of the sequences, score on the second."""
    cluster = Cluster.grid(CLUSTER_NODES, CLUSTER_GPUS)
    is_first_half = trace.sequence_T < np.unique(trace.sequence_T).mean()
    seen, unseen = (Problem.from_trace(trace.select(rows), cluster) for rows in (is_first_half, ~is_first_half))
    plans = {
        "contiguous": solve(seen, objective="fanout+balance", solver="contiguous"),
        "solved": solve(seen, objective="fanout+balance", time_limit_s=20.0),
    }
    plans["solved"].save(out / "plan.json")
    load_LE = unseen.load_WLE[0]
    return Placements(
        cluster=cluster,
        load_LG={name: _gpu_load_LG(plan, load_LE) for name, plan in plans.items()},
        scores={name: score(unseen, plan) for name, plan in plans.items()},
        plan=plans["solved"],
    )


def _gpu_load_LG(plan: Plan, load_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    share_LEG = plan.copies_LEG / plan.replicas_LE[..., None]
    return np.einsum("leg,le->lg", share_LEG, load_LE)
