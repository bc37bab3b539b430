"""`expertier bench members`: what switching between whole models costs, in memory for one of them and for both.

The floor of a switch is the missing member's bytes over the rate of the disk. A member whose layers are all in memory
reads nothing: what a switch costs then is its first pass beside its next one.
"""

import tempfile
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_folder, expect_outputs
from routing.ground.files import write_json
from routing.ground.quantity import format_size, parse_size
from routing.ground.terminal import plain_console

from ...evidence.generated import Generated, save_generated
from ...evidence.memory_limit import drop_cached
from ...evidence.record import RECORDS, expect_records, save_record
from .in_process import measured
from .streamed import SEED, SHARD_BYTES, config_of, disk_rate

# a request is one token; the cache takes next to nothing
NAMES, CONTEXT = ("first", "second"), 64
ROOM = {"one": 0.1, "both": 1.1}
"""Sizes of a member that the budget has room for, beyond what one member needs alone."""
KERNEL_SHARE = 0.95
"""Of the control group that the budget may take: the kernel's own memory counts there, too."""
GOALS = {"share_of_disk": 0.90, "switch_s": 0.010}
"""What the project's issue on offloading systems asks for: of a switch that reads, and of one that does not."""


def bench_members(
    folder: Annotated[Path, typer.Option(help="Where the generated models go, on the disk to be measured.")],
    size: Annotated[str, typer.Option(help="Of each of the two members.")] = "1GB",
    hidden: Annotated[int, typer.Option(min=128, help="Model width.")] = 2048,
    rounds: Annotated[int, typer.Option(min=2, help="Switches to each member that are timed.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the rows under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Switch between two models in a memory for one of them, and in a memory for both.

    The machine must be quiet. Each memory is a control group of its own.

    Example: `expertier bench members --folder /data/scratch --size 1GB`
    """
    expect_outputs(json_file, inputs=[])
    expect_records(records)
    expect_folder(folder / "model")
    config = config_of("dense", parse_size(size), hidden)
    check_parity()
    with tempfile.TemporaryDirectory(dir=folder, prefix="expertier-members-") as place:
        written = write_members(Path(place), config)
        needs = measured("members", file=str(Path(place, "models.yaml")), memory=None, rounds=0)["needs_bytes"]
        rows = [_row(Path(place), written, room, needs, rounds) for room in ROOM]
    if len({row.pop("digest") for row in rows}) > 1:
        raise RuntimeError("members that push each other out of memory give other bits; no time is told")
    for row in rows:
        plain_console().print(_line(row), highlight=False)
    if json_file:
        write_json(json_file, rows)
    if record:
        kept = {"hidden": hidden, "layers": config["num_hidden_layers"], "rounds": rounds, "goals": GOALS}
        typer.echo(f"record: {save_record('bench-members', rows, config=kept, seed=SEED, folder=records)}")


def write_members(place: Path, config: dict[str, Any]) -> Generated:
    """Two models of one config and other weights, and the file that names them; what one of them takes."""
    written = [save_generated(place / name, config, SHARD_BYTES, seed=SEED + 1 + at) for at, name in enumerate(NAMES)]
    rows = "".join(f"  - name: {name}\n    model: {name}\n" for name in NAMES)
    (place / "models.yaml").write_text(f"members:\n{rows}", encoding="utf-8")
    return written[0]


def check_parity() -> None:
    """Members of one pool must give the resident models' bits, before anything is timed.

    Raises:
        RuntimeError: if they do not.
    """
    import torch

    import offload

    from ...evidence import resident
    from .streamed import KINDS

    ids = torch.arange(12)[None]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        place = Path(folder)
        write_members(place, KINDS["dense"](128, 3, 256))
        members = offload.load_members(place / "models.yaml", cpu_memory="2GiB", context=CONTEXT)
        try:
            for name in (*NAMES, *NAMES):
                members.choose("", label=name)
                expected = resident.load_resident(place / name, dtype=torch.bfloat16)(ids).logits
                if not torch.equal(members.models[name](ids).logits, expected):
                    raise RuntimeError(f"member {name} gives other bits than alone; nothing is measured")
        finally:
            members.close()


def _row(place: Path, written: Generated, room: str, needs: int, rounds: int) -> dict[str, Any]:
    budget = needs + int(ROOM[room] * written.nbytes)
    for name in NAMES:
        drop_cached(place / name)
    rate = disk_rate(place / NAMES[0])
    given = {"file": str(place / "models.yaml"), "memory": budget, "rounds": rounds}
    found = measured("members", int(budget / KERNEL_SHARE), **given)
    rate = (rate + disk_rate(place / NAMES[0])) / 2
    switch_s, read = median(found["first_s"]), median(found["bytes_read"])
    return {
        "room": room,
        "member_bytes": written.nbytes,
        "budget": budget,
        "n": len(found["first_s"]),
        "first_s": switch_s,
        "next_s": median(found["next_s"]),
        "switch_s": median(_differences(found["first_s"], found["next_s"])),
        "bytes_read": read,
        "disk_bytes_per_s": rate,
        "share_of_disk": read / switch_s / rate if read else None,
        "peak_bytes": found["peak_bytes"],
        "digest": found["digest"],
    }


def _differences(first: Sequence[float], following: Sequence[float]) -> list[float]:
    return [before - after for before, after in zip(first, following, strict=True)]


def measure(file: str, memory: int | None, rounds: int) -> dict[str, Any]:
    """Call two members in turn, each twice: seconds from choosing to logits, and bytes that the first call read.

    Without a budget nothing is called: what one member needs alone is all that is said.
    """
    import torch
    import transformers

    import offload

    transformers.logging.disable_progress_bar()
    if memory is None:
        alone = Path(file).parent / NAMES[0]
        offload.fit(alone, context=CONTEXT)  # loads the libraries, which the next one counts as held
        return {"needs_bytes": offload.fit(alone, context=CONTEXT).budgets.all_bytes}
    members, ids = offload.load_members(file, cpu_memory=memory, context=CONTEXT), torch.tensor([[1]])
    found: dict[str, list[float]] = {"first_s": [], "next_s": [], "bytes_read": []}
    digest = sha256()

    def call(name: str) -> float:
        began = time.perf_counter()
        members.choose("", label=name)
        logits = members.models[name](ids).logits
        took_s = time.perf_counter() - began
        digest.update(logits.view(torch.uint8).numpy().tobytes())
        return took_s

    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name in NAMES:
                before = members.report()[name]["bytes_read"]
                first_s, next_s = call(name), call(name)
                read = members.report()[name]["bytes_read"] - before
                if turn:  # the first calls read everything, whatever memory there is
                    for key, value in zip(found, (first_s, next_s, float(read)), strict=True):
                        found[key].append(value)
    members.close()
    return {**found, "digest": digest.hexdigest()}


def _line(row: dict[str, Any]) -> str:
    said = f"memory for {row['room']} of two members of {format_size(row['member_bytes'])}: "
    if row["share_of_disk"] is None:
        return f"{said}nothing is read, a switch costs {row['switch_s'] * 1e3:.1f} ms beside a pass"
    return (
        f"{said}a switch takes {row['first_s']:.3f} s and reads {format_size(row['bytes_read'])}, "
        f"{row['share_of_disk']:.0%} of the disk's {row['disk_bytes_per_s'] / 1e9:.2f} GB/s"
    )
