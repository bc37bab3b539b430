"""`expertier bench pregated`: how long a model waits for experts on a wire, if its routers decide ahead and if not.

The wire is simulated: experts are computed by the processor, and a clock says when each copy would have ended at PCIe's
rate (`device="simulated"`). Weights are random, so slots find less than after training. What deciding ahead costs in
loss is another record's question (router-comparison).

Source: Hwang et al. 2023 (Pre-gated MoE), arXiv:2308.12066.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.expect import expect_folder, expect_outputs
from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ...evidence.record import RECORDS, expect_records, save_record
from .in_process import TEMPORARY

ROUTERS: Mapping[str, dict[str, Any]] = {
    "ordinary": {"router": "olmoe"},
    **{f"{ahead} ahead": {"router": "pregate", "router_options": {"ahead": ahead}} for ahead in (1, 2, 3)},
}
"""As the paper: gates of the layer itself, or of up to three layers before it."""
SHARES = (0.25, 0.5)
"""Of a layer's experts that have a slot behind the wire."""
GOAL = 0.05
"""Share of a step that waiting may take at half of the slots, by the project's issue on offloading systems."""
# few ids, since tokens are drawn; and of weights and tokens
VOCABULARY, SEED = 1024, 0


def bench_pregated(
    folder: Annotated[Path, typer.Option(help="Where the generated models go.")] = TEMPORARY,
    layers: Annotated[int, typer.Option(min=4, help="Layers with experts.")] = 8,
    experts: Annotated[int, typer.Option(min=4, help="Experts of a layer.")] = 16,
    width: Annotated[int, typer.Option(min=64, help="D, and F of an expert.")] = 1024,
    steps: Annotated[int, typer.Option(min=2, help="Tokens that are decoded and timed.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the rows under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Decode behind a simulated wire of 16 GB/s: the share of a step that waits for experts, at 25 and 50 % of slots.

    Example: `expertier bench pregated --steps 64`
    """
    expect_outputs(json_file, inputs=[])
    expect_records(records)
    expect_folder(folder / "model")
    sizes = {"layers": layers, "experts": experts, "width": width}
    check_parity()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="expertier-pregated-") as place:
        for name, settings in ROUTERS.items():
            checkpoint = str(Path(place, name))
            save_model(checkpoint, settings, **sizes)
            for share in SHARES:
                slots = max(int(share * experts), 1)
                _, found = decoded(checkpoint, slots, experts, is_ahead=name != "ordinary", steps=steps)
                rows.append({"router": name, "share": share, **found, "n": steps})
    _print(rows)
    if json_file:
        write_json(json_file, rows)
    if record:
        typer.echo(f"record: {save_record('bench-pregated', rows, config=sizes, seed=SEED, folder=records)}")


def save_model(folder: str, settings: Mapping[str, Any], *, layers: int, experts: int, width: int) -> None:
    """A model of random weights in bfloat16."""
    import torch

    from moe import MoEConfig, MoEForCausalLM

    sizes = {"hidden_size": width, "moe_intermediate_size": width, "num_hidden_layers": layers, "head_dim": 64}
    sizes |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": VOCABULARY}
    config = MoEConfig(**sizes, num_experts=experts, num_experts_per_tok=2, **settings)
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        MoEForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)


def check_parity() -> None:
    """Few slots must give the bits of all slots, with every router, before anything is timed.

    Raises:
        RuntimeError: if they do not.
    """
    import torch

    with tempfile.TemporaryDirectory() as place:
        for name, settings in ROUTERS.items():
            checkpoint = str(Path(place, name))
            save_model(checkpoint, settings, layers=4, experts=4, width=64)
            expected, *others = (
                decoded(checkpoint, slots, 4, is_ahead=name != "ordinary", steps=4)[0] for slots in (4, 2, 1)
            )
            if not all(torch.equal(other, expected) for other in others):
                raise RuntimeError(f"{name}: the number of slots changes the output; nothing is measured")


def decoded(checkpoint: str, slots: int, experts: int, *, is_ahead: bool, steps: int) -> tuple[Any, dict[str, Any]]:
    """Logits of fixed tokens, and what the steps after the first quarter took on the model's clock."""
    import torch
    import transformers

    import offload

    transformers.logging.disable_progress_bar()
    load: dict[str, Any] = {"device": "simulated", "gpu_experts": slots, "cache_experts": experts, "context": 2 * steps}
    model = offload.load(checkpoint, **load, prefetch="plan" if is_ahead else "off")
    token_S = torch.randint(VOCABULARY, (steps + steps // 4,), generator=torch.Generator().manual_seed(SEED))
    model.offload.runtime.ahead.fill([range(experts)] * len(model.offload.runtime.layers))
    logits, lane = list[Any](), model.offload.lane
    past: Any = None
    began_s = stalled_s = 0.0
    try:
        with torch.inference_mode():
            for number, token in enumerate(token_S):
                if number == steps // 4:
                    model.offload.reset()
                    began_s, stalled_s = lane.now_s(), lane.stall_s
                output = model(token[None, None], past_key_values=past, use_cache=True)
                past = output.past_key_values
                logits.append(output.logits)
        taken_s, waited_s = lane.now_s() - began_s, lane.stall_s - stalled_s
        gpu = model.offload.report()["gpu"]
    finally:
        model.offload.close()
    return torch.cat(logits), {
        "step_s": taken_s / steps,
        "stall_s": waited_s / steps,
        "stall_share": waited_s / taken_s,
        "hit_rate": gpu["hit_rate"],
        "copied_ahead": gpu["copied_ahead"] / steps,
        "wire_s": gpu["copied_s"] / steps,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("router", "slots", "step ms", "waits", "wire ms", "hit rate", "copied ahead")
    for row in rows:
        numbers = (f"{row['step_s'] * 1e3:.2f}", f"{row['stall_share']:.1%}", f"{row['wire_s'] * 1e3:.2f}")
        table.add_row(row["router"], f"{row['share']:.0%}", *numbers, f"{row['hit_rate']:.2f}",
                      f"{row['copied_ahead']:.1f}")  # fmt: skip
    plain_console().print(table)
