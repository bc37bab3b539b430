"""`expertier bench units`: a model of sparse hidden units at half its memory, by units and by whole layers.

The model is trained here on text, with a penalty that rises until most of its units are zero. Whole layers are streamed
in the same memory control group; of a mixture, whole experts. Both are held against the model in memory by their loss
and the largest difference of logits: sums without their zeros are the model's terms in another order.

Source: Alizadeh et al. 2023 (LLM in a flash), arXiv:2312.11514.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_folder, expect_outputs
from routing.ground.files import write_json
from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console

from ...evidence.memory_limit import drop_cached
from ...evidence.record import RECORDS, expect_records, save_record
from .in_process import measured

# bytes of one text; attention is small, because feed-forwards are what is asked about
DOMAIN, VOCABULARY, HEAD_WIDTH, HEADS = "prose", 256, 64, 4
TOP_K = 2
"""Experts of a token, with --experts."""
RATE = 1e-3
"""The largest learning rate; not tuned."""
ZEROS = 0.85
"""Share of units that the penalty aims at: above the 80 % from which the issue's goal counts."""
RISE, FALL = 1.15, 0.5
"""By which the penalty changes at each step. It falls fast, since units that are never active hardly come back: with a
slower fall 98 % were zero where 85 % was the aim."""
KERNEL_SHARE = 0.95
"""Of the control group that the budget may take."""
CLOSE = 0.1
"""Largest difference of bfloat16 logits that another order of sums is allowed, of logits around 10."""
# bytes before those that are timed; and of weights and rows
PROMPT, SEED = 8, 0
GOAL = 3.0
"""Times as fast as whole layers, by the project's issue on offloading systems."""


def bench_units(
    folder: Annotated[Path, typer.Option(help="Where the model goes, on the disk to be measured.")],
    width: Annotated[int, typer.Option(min=64, help="D; a unit is three rows of it.")] = 2048,
    units: Annotated[int, typer.Option(min=64, help="F, hidden units of a feed-forward, or of each expert.")] = 3072,
    experts: Annotated[int, typer.Option(min=0, help="Experts of a layer, of which 2 are chosen; 0 is dense.")] = 0,
    layers: Annotated[int, typer.Option(min=2, help="Decoder layers.")] = 6,
    train_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of 1,024 bytes.")] = 50,
    steps: Annotated[int, typer.Option(min=2, help="Bytes that are decoded and timed.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the rows under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Train a ReLU model, then decode with half of its weights in memory: by hidden units, and by whole layers.

    With --experts the model is a mixture, and its experts come by units, or whole.

    Example: `expertier bench units --folder /data/scratch`
    """
    expect_outputs(json_file, inputs=[])
    expect_records(records)
    expect_folder(folder / "model")
    import offload

    check_parity(experts)
    sizes = {"width": width, "units": units, "layers": layers, "experts": experts}
    with tempfile.TemporaryDirectory(dir=folder, prefix="expertier-units-") as place:
        checkpoint, bundle = Path(place, "model"), Path(place, "model.units")
        penalty = train(checkpoint, train_steps, **sizes)
        offload.pack_units(checkpoint, bundle)
        rows = compared(checkpoint, bundle, steps, "whole experts" if experts else "whole layers")
    for row in rows:
        plain_console().print(_line(row), highlight=False)
    if json_file:
        write_json(json_file, rows)
    if record:
        kept = {**sizes, "train_steps": train_steps, "penalty": penalty, "goal": GOAL}
        typer.echo(f"record: {save_record('bench-units', rows, config=kept, seed=SEED, folder=records)}")


def train(folder: Path, steps: int, *, width: int, units: int, layers: int, experts: int) -> float:
    """Train a ReLU model on bytes until most of its units are zero; saves it in bfloat16 and gives the last penalty."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    from ..claims.claim import fit
    from ..claims.domains import rows_of

    torch.manual_seed(SEED)
    sizes = {"hidden_size": width, "intermediate_size": units, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_WIDTH}
    kind = {"hidden_act": "relu", "max_position_embeddings": 1024}
    if experts:
        chosen = {"num_experts": experts, "num_experts_per_tok": min(TOP_K, experts), "moe_intermediate_size": units}
        model = AutoModelForCausalLM.from_config(
            Qwen3MoeConfig(**sizes, **heads, **kind, **chosen, norm_topk_prob=True)
        )
    else:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, **kind))
    gates: list[torch.Tensor] = []
    for layer in model.model.layers:
        rectified = (layer.mlp.experts if experts else layer.mlp).act_fn
        rectified.register_forward_hook(lambda module, given, unit: gates.append(given[0]))
    draws, penalty = np.random.default_rng(SEED), 0.02

    def loss_of(step: int) -> torch.Tensor:
        nonlocal penalty
        token_BS = rows_of([DOMAIN], draws)
        gates.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss: torch.Tensor = model(token_BS, labels=token_BS, use_cache=False).loss
        zeros = sum(float((gate <= 0).float().mean()) for gate in gates) / len(gates)
        penalty *= RISE if zeros < ZEROS else FALL
        return loss + penalty * torch.stack([gate.relu().float().mean() for gate in gates]).sum()

    fit(model.parameters(), loss_of, steps, RATE)
    model.to(torch.bfloat16).save_pretrained(folder)
    return penalty


def check_parity(experts: int) -> None:
    """On a small model of this kind, logits by units must be close to the resident model's, before anything is timed.

    Raises:
        RuntimeError: if they are not.
    """
    import torch

    import offload

    from ...evidence import resident

    ids = torch.arange(12)[None]
    with tempfile.TemporaryDirectory() as place:
        checkpoint, bundle = Path(place, "model"), Path(place, "model.units")
        train(checkpoint, 1, width=64, units=128, layers=2, experts=experts)
        offload.pack_units(checkpoint, bundle)
        model = offload.load(checkpoint, pack=bundle, cache_units=16)
        try:
            with torch.inference_mode():
                expected = resident.load_resident(checkpoint, dtype=torch.bfloat16)(ids).logits
                difference = float((model(ids).logits - expected).abs().max())
        finally:
            model.offload.close()
    if difference > CLOSE:
        raise RuntimeError(f"units change logits by {difference:.2g}; nothing is measured")


def compared(checkpoint: Path, bundle: Path, steps: int, whole_way: str) -> list[dict[str, Any]]:
    """Rows of the whole model, and of both ways within its needs without half of its weights.

    Args:
        checkpoint, bundle: of the model.
        steps: bytes that are timed.
        whole_way: name of the way without units.

    Raises:
        RuntimeError: if logits differ by more than another order of sums makes of them.
    """
    given = {"checkpoint": str(checkpoint), "steps": steps}
    whole = measured("units", **given, memory=None, bundle=None)
    budget = whole["needs_bytes"] - whole["weight_bytes"] // 2
    rows = [{"way": "in memory", "budget": None, **whole}]
    for way, given_bundle in ((whole_way, None), ("units", str(bundle))):
        drop_cached(checkpoint)
        drop_cached(bundle.parent)
        limit = int(budget / KERNEL_SHARE)
        rows.append(
            {"way": way, "budget": budget, **measured("units", limit, **given, memory=budget, bundle=given_bundle)}
        )
    logits = [row.pop("logits") for row in rows]
    for row, found in zip(rows, logits, strict=True):
        row["difference"] = max(abs(one - other) for one, other in zip(found, logits[0], strict=True))
        row["weight_bytes"], row["needs_bytes"], row["n"] = whole["weight_bytes"], whole["needs_bytes"], steps
        row["times_layers"] = rows[1]["step_s"] / row["step_s"]
        if row["difference"] > CLOSE:
            raise RuntimeError(f"{row['way']}: logits differ by {row['difference']:.2g}; no time is told")
    return rows


def measure(checkpoint: str, steps: int, memory: int | None, bundle: str | None) -> dict[str, Any]:
    """Decode held-out bytes one by one: seconds, loss, what was read, and some logits of each step."""
    import torch
    import transformers

    import offload

    from ..claims.domains import held_out_rows

    transformers.logging.disable_progress_bar()
    context = PROMPT + steps + 1
    offload.fit(checkpoint, context=context)  # loads the libraries, which the next one counts as held
    needs = offload.fit(checkpoint, context=context).budgets.all_bytes
    model = offload.load(checkpoint, cpu_memory=memory or "auto", context=context, pack=bundle, io="direct")
    token_S = held_out_rows(DOMAIN, context, 1)[0]
    step_s, losses, logits = list[float](), list[float](), list[float]()
    with torch.inference_mode():
        past = model(token_S[None, :PROMPT], use_cache=True).past_key_values
        model.offload.reset()
        for position in range(PROMPT, PROMPT + steps):
            began = time.perf_counter()
            output = model(token_S[None, position : position + 1], past_key_values=past, use_cache=True)
            step_s.append(time.perf_counter() - began)
            found = output.logits[0, -1].float()
            losses.append(float(torch.nn.functional.cross_entropy(found, token_S[position + 1])))
            logits += found[:4].tolist()
    report = model.offload.report()
    chosen = report.get("units", {"chosen": 0, "active": 0, "visited": 0})
    visited = chosen["visited"]
    return {
        "step_s": median(step_s),
        "loss": sum(losses) / steps,
        "logits": logits,
        "needs_bytes": needs,
        "weight_bytes": report["memory"]["weight_bytes"] + report["memory"]["slot_bytes"],
        "read_per_step": report["bytes_read"] / steps,
        "zeros": 1 - chosen["active"] / visited if visited else None,
        "not_chosen": 1 - chosen["chosen"] / visited if visited else None,
    }


def _line(row: dict[str, Any]) -> str:
    said = (
        f"{row['way']}: step {row['step_s'] * 1e3:.1f} ms, {row['times_layers']:.2f} times as fast as whole, reads "
        f"{format_size(row['read_per_step'])} of {format_size(row['weight_bytes'])}; loss {row['loss']:.3f}"
    )
    return said if row["zeros"] is None else f"{said}; {row['zeros']:.1%} zeros, {row['not_chosen']:.1%} not read for"
