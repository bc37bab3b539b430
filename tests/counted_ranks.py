"""Bytes that processes move, by the counters of the only interface that they have; started by `run_ranks`.

They run in a network namespace of their own (`unshare --net`), so everything on its loopback interface is theirs.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from experiments.placed.work import Layer, Size, carry_out
from experiments.train.distributed.run import build_parts
from experiments.train.distributed.step import distributed_step
from moe.parallel import Layout, step_floor
from placement import Cluster, Plan
from routing.traces import RoutingTrace
from tests.split_ranks import CPU, SMALL, config_of, corpus_of

STEPS = 4
WIDE = SMALL | {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "head_dim": 64,
    "router": "olmoe",
    "num_dense_layers": 0,
}


def sent_bytes() -> int:
    """Bytes that the loopback interface has sent, headers and acknowledgements included."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def between(work: Any) -> int:
    distributed.barrier()
    before = sent_bytes()
    work()
    distributed.barrier()
    return sent_bytes() - before


def training(text: str) -> dict[str, Any]:
    """Bytes of some steps beside their floor."""
    W = distributed.get_world_size()
    config = config_of(WIDE, accumulation=W, batch_size=4, sequence_length=64)
    parts = build_parts(config, corpus_of(), Layout.parse(text, W), CPU)
    distributed_step(parts, 0)
    floors = []

    def work() -> None:
        for step in range(1, STEPS + 1):
            distributed_step(parts, step)
            rows = torch.tensor([sum(bank.traffic.remote_rows for bank in parts.split.experts)])
            distributed.all_reduce(rows)
            floors.append(step_floor(parts.model, parts.split, 1, int(rows)))

    moved = between(work)
    return {
        "moved": moved,
        "floor": sum(floor.total for floor in floors),
        "weights": sum(floor.weights for floor in floors),
        "gradients": sum(floor.gradients for floor in floors),
        "tokens": sum(floor.tokens for floor in floors),
    }


def placed() -> dict[str, int]:
    """Bytes of a trace through a plan beside the rows that `place run` counts."""
    random = np.random.default_rng(0)
    expert_TLK = np.argsort(random.gumbel(size=(4000, 2, 16)), axis=2)[:, :, :4].astype(np.int16)
    trace = RoutingTrace(
        expert_TLK=expert_TLK,
        sequence_T=np.repeat(np.arange(40), 100).astype(np.int32),
        metadata={"num_experts": 16},
    )
    W = distributed.get_world_size()
    plan = Plan(
        physical_to_logical_LP=np.stack([random.permutation(16) for _ in range(2)]),
        num_experts=16,
        cluster=Cluster.grid(1, W),
        layer_ids=(0, 1),
        hidden_layers=2,
    )
    Layer(plan, 0, trace, Size(), W)  # its first use reads files and loads libraries
    found: dict[str, int] = {}
    moved = between(lambda: found.update(bytes=carry_out(plan, trace, Size(width=256))["bytes"]))
    return found | {"moved": moved}


def main() -> None:
    place = Path(os.environ["RANKS_FOLDER"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=count, timeout=timedelta(seconds=300)
    )
    found = {text: training(text) for text in sys.argv[1:]} | {"placed": placed()}
    if rank == 0:
        (place / "found.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
