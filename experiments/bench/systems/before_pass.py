"""`expertier bench before-pass`: experts foreseen from token ids, before a pass: how many, and what decoding gains.

A small mixture is trained here on text, and its routing recorded with token ids. A predictor learns from one part of
the text. A replay checkpoint with large experts then decodes another part, which the predictor has not seen. It does so
without the predictor, with reads ahead, and with eviction by prediction as well. Token ids of a replay are rows of
the trace, so the predictor's embedding is given by row.

Source: He et al. 2024 (ExpertFlow), arXiv:2410.17954.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from routing.ground.expect import expect_folder, expect_outputs
from routing.ground.files import write_json
from routing.ground.quantity import parse_size
from routing.ground.terminal import plain_console

from ...evidence.record import RECORDS, expect_records, save_record
from ..offloading.bench import check_parity, ensure_checkpoint, run_contestant

DOMAINS = ("prose", "python")
CONTESTANTS = ("ours", "ours-ahead", "ours-predicted")
HIDDEN, EXPERT_WIDTH, TOP_K = 128, 64, 4
"""Of the mixture that is trained."""
# as many tokens as the predictor looks back on; and of all draws
PREFILL, SEED = 32, 0
GOAL = 1.10
"""Times as fast as without a predictor, by the project's issue on offloading systems."""


def bench_before_pass(
    folder: Annotated[Path, typer.Option(help="Where models and traces go, on the disk to be measured.")],
    limit: Annotated[str, typer.Option(help="Of each process's memory control group, or none.")] = "3GiB",
    layers: Annotated[int, typer.Option(min=2, help="Layers with experts.")] = 12,
    experts: Annotated[int, typer.Option(min=4, help="Experts of a layer.")] = 32,
    train_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the mixture, of 1,024 bytes.")] = 150,
    tokens: Annotated[int, typer.Option(min=600, help="Bytes of text that the predictor learns from.")] = 16384,
    decode: Annotated[int, typer.Option(min=2, help="Tokens that are decoded and timed.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way, which take turns.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the rows under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Foresee the experts of a trained mixture from token ids, and decode with them under a memory limit.

    Example: `expertier bench before-pass --folder /data/scratch --limit 3GiB`
    """
    expect_outputs(json_file, inputs=[])
    expect_records(records)
    expect_folder(folder / "model")
    if limit != "none":
        parse_size(limit)
    check_parity()
    with tempfile.TemporaryDirectory(dir=folder, prefix="expertier-before-pass-") as name:
        place = Path(name)
        train(place / "mixture", layers, experts, train_steps)
        scores = foresee(place, tokens, PREFILL + decode)
        plain_console().print(_said(scores))
        ensure_checkpoint(place / "replay", place / "held.npz", PREFILL + decode, "plain")
        by_row(place / "pass.npz", place / "held.npz", place / "rows.npz")
        rows = _runs(place, limit, decode, repeats)
    gains = {each: median(_rates(rows, each)) / median(_rates(rows, "ours")) for each in CONTESTANTS[1:]}
    for each, gain in gains.items():
        plain_console().print(f"{each}: {gain:.3f} times ours, whose goal is {GOAL}", highlight=False)
    if json_file:
        write_json(json_file, {"scores": scores, "gains": gains, "rows": rows})
    if record:
        kept = {"layers": layers, "experts": experts, "train_steps": train_steps, "tokens": tokens, "limit": limit}
        kept |= {"scores": scores, "gains": gains, "goal": GOAL}
        typer.echo(f"record: {save_record('bench-before-pass', rows, config=kept, seed=SEED, folder=records)}")


def train(folder: Path, layers: int, experts: int, steps: int) -> None:
    """A mixture of bytes, with the tokenizer that its trace needs."""
    import torch

    from moe import MoEConfig, MoEForCausalLM, save_byte_tokenizer

    from ..claims.domains import tune

    torch.manual_seed(SEED)
    sizes = {"vocab_size": 256, "hidden_size": HIDDEN, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": HIDDEN // 4}
    sizes |= {"num_experts": experts, "num_experts_per_tok": TOP_K, "moe_intermediate_size": EXPERT_WIDTH}
    model = MoEForCausalLM(MoEConfig(**sizes, router="olmoe"))
    tune(model, DOMAINS, steps, SEED)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)


def foresee(place: Path, tokens: int, rows: int) -> dict[str, Any]:
    """Record both traces and train the predictor; what it says of the last tenth of its rows."""
    from ..claims.domains import domains, training_part

    parts = [training_part(name)[: tokens // len(DOMAINS)] for name in DOMAINS]
    (place / "learnt.txt").write_bytes(b"".join(part.tobytes() for part in parts))
    (place / "held.txt").write_bytes(domains()[DOMAINS[0]][-4 * rows :].tobytes())
    for name, count in (("learnt", tokens), ("held", rows)):
        text, out = place / f"{name}.txt", place / f"{name}.npz"
        _command("trace", "record", place / "mixture", "--data", text, "--out", out, "--tokens", count)
    report = place / "report.json"
    _command(
        *("trace", "predictor", place / "learnt.npz", "--before-pass", "--out", place / "pass.npz", "--json", report)
    )
    scores: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return scores


def _command(*arguments: object) -> None:
    """Run `expertier`, as a user does."""
    given = [sys.executable, "-m", "experiments.cli", *map(str, arguments)]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(given[3:5])} failed: {done.stderr.strip()}")


def by_row(predictor: Path, trace: Path, out: Path) -> None:
    """Write a predictor whose token ids are rows of a trace: row t is embedded as the token of row t."""
    from routing.traces import RoutingTrace

    token_T = RoutingTrace.load(trace).token_T
    if token_T is None:
        raise ValueError(f"trace {trace} has no token ids, so experts cannot be foreseen from them")
    with np.load(predictor) as stored:
        arrays: dict[str, NDArray[Any]] = {name: stored[name] for name in stored.files}
    arrays["pass.embed_tokens.weight"] = arrays["pass.embed_tokens.weight"][token_T.astype(np.int64)]
    arrays["pass_sizes"][0] = len(token_T)
    np.savez(out, **arrays)


def _runs(place: Path, limit: str, decode: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for repeat in range(repeats):
        for name in CONTESTANTS:
            given = None if name == "ours" else place / "rows.npz"
            row = run_contestant(name, place / "replay", limit, PREFILL, decode, given)
            if row["tok_per_s"] is None:
                raise RuntimeError(f"{name} failed: {row['note']}")
            rows.append({"repeat": repeat, **row})
            if row["logits"] != rows[0]["logits"]:
                raise RuntimeError(f"{name}: a guess changes the output; no time is told")
            plain_console().print(f"{name}: {row['tok_per_s']:.3f} tok/s", highlight=False)
    return rows


def _rates(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row["tok_per_s"] for row in rows if row["contestant"] == name]


def _said(scores: dict[str, Any]) -> str:
    precision, recall = scores["before"]
    return (
        f"before the pass {recall:.1%} of the experts are guessed, {precision:.1%} of the guesses are right; "
        f"{scores['top']:.1%} are among the likeliest, as many as a token visits"
    )
