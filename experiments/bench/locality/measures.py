"""What one trained run is like for offloading: its trace, its reads and speed from the SSD, its placement.

Shapes: B sequences, S positions, T tokens, L MoE layers.
"""

import json
from pathlib import Path
from typing import Any

import torch

import offload
from moe import MoEForCausalLM
from placement import Cluster, Problem, score, solve
from routing import RoutingTrace
from routing.ground.files import write_json

from ...compare.measures.choices import trace_of
from ...compare.runs import Run
from ...evidence.locality import locality_of, slots_of
from ...evidence.resident import load_resident
from ...train.corpus import Corpus
from ...train.loop import held_out_rows

MEASURED_FILE, TRACE_FILE = "locality.json", "routing.npz"
BUDGETS = (0.125, 0.25)
"""Slots of the SSD measurements, as shares of a layer's experts."""
TRACED_TOKENS, PROMPT_TOKENS, DECODED_TOKENS = 16_384, 32, 128
"""Held-out tokens of the trace; tokens of a prompt and after it, which are given and not sampled, so that every variant
reads the same text."""
CLUSTER_NODES, CLUSTER_GPUS, SOLVE_S = 2, 4, 10.0
"""Eight GPUs in two nodes, four experts of 32 on each, as in the demo; seconds of the placement's search."""
TOLERANCE = 1e-3
"""Largest difference of logits, relative to their range, between the offloaded and the resident model."""


def measure(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Everything about a finished run; read from its folder if it was measured before.

    Raises:
        RuntimeError: if the offloaded model's logits are not the resident model's.
    """
    file = run.folder / MEASURED_FILE
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    model = load_resident(run.folder)
    trace = _trace(model, run, corpus)
    trace.save(run.folder / TRACE_FILE)
    found = locality_of(trace, policies=("learned",)) | {"gpu_fanout": _fanout(trace)}
    for share in BUDGETS:
        percent = f"{100 * share:g}"
        speed = _from_ssd(model, run.folder, corpus, slots_of(trace, share))
        found |= {f"{name}_{percent}": value for name, value in speed.items()}
    write_json(file, found)
    return found


@torch.no_grad()
def _trace(model: MoEForCausalLM, run: Run, corpus: Corpus) -> RoutingTrace:
    rows = held_out_rows(corpus, run.config)
    rows = rows[: max(2, TRACED_TOKENS // rows.shape[1])]
    batches = [rows[start : start + run.config.batch_size] for start in range(0, len(rows), run.config.batch_size)]
    calls = [model(torch.from_numpy(batch.astype("int64")), use_cache=False).router_stats for batch in batches]
    return trace_of(calls, rows.shape, model.config.num_experts, source=run.variant)


def _fanout(trace: RoutingTrace) -> float:
    """Distinct GPUs that a token visits per layer on the second half, of a placement solved on the first."""
    cluster = Cluster.grid(CLUSTER_NODES, CLUSTER_GPUS)
    is_first = trace.sequence_T < trace.sequence_T.mean()
    seen, unseen = (Problem.from_trace(trace.select(rows), cluster) for rows in (is_first, ~is_first))
    plan = solve(seen, objective="fanout", time_limit_s=SOLVE_S)
    return float(score(unseen, plan).gpu_fanout)


def _from_ssd(model: MoEForCausalLM, folder: Path, corpus: Corpus, slots: int) -> dict[str, float]:
    """`reads` per token and layer and `tokens_per_second`, while given tokens are decoded past the page cache."""
    token_T = torch.from_numpy(corpus.held_out[: PROMPT_TOKENS + DECODED_TOKENS].astype("int64"))
    loaded = offload.load(folder, cache_experts=slots, io="direct", policy="learned")
    ours, report = _decode(loaded, token_T)
    theirs, _ = _decode(model, token_T)
    runtime = loaded.offload.runtime
    expert_bytes = sum(layer.expert_bytes for layer in runtime.layers) / len(runtime.layers)
    loaded.offload.close()
    worst = float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"{folder}: logits from the SSD differ from the resident model's by {worst:.2g} of their range"
        )
    tokens = len(ours)
    return {
        "reads": report["bytes_read"] / expert_bytes / (tokens * len(runtime.layers)),
        "tokens_per_second": tokens / report["achieved_s"],
    }


@torch.no_grad()
def _decode(model: Any, token_T: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits of every token after the prompt, one call each, and the report of these calls."""
    step = model(token_T[None, :PROMPT_TOKENS], use_cache=True)
    # the first token after a prompt fills what the prompt left empty
    step = model(token_T[None, PROMPT_TOKENS : PROMPT_TOKENS + 1], past_key_values=step.past_key_values, use_cache=True)
    if hasattr(model, "offload"):
        model.offload.reset()
    logits = []
    for token in token_T[PROMPT_TOKENS + 1 :]:
        step = model(token.view(1, 1), past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits[0, -1])
    return torch.stack(logits), model.offload.report() if hasattr(model, "offload") else {}
