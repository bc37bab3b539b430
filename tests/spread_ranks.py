"""A model whose experts are spread over processes, beside one that has them all; started by `run_ranks`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import offload
from experiments.placed.serving import PROCESSES

OPTIONS = {"cpu_memory": "2GiB", "arithmetic": "fixed", "context": 256}


@torch.no_grad()
def logits_of(model: Any) -> list[torch.Tensor]:
    """Of a prompt of 70 tokens and of three tokens after it, one at a time."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, 73), generator=generator)
    found = model(ids[:, :70], use_cache=True)
    logits = [found.logits]
    for place in range(70, 73):
        found = model(ids[:, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
        logits.append(found.logits)
    return logits


def main() -> None:
    torch.set_num_threads(1)
    place, (folder, plan) = Path(os.environ["RANKS_FOLDER"]), sys.argv[1:]
    options = OPTIONS | {"plan": Path(plan)}
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=count)
    if rank:
        PROCESSES.follow(folder, **options)
        return
    model = PROCESSES.lead(folder, **options)
    spread = logits_of(model)
    reports = [model.offload.report(), *model.offload.of_others()]
    model.offload.close()
    whole = offload.load(folder, **OPTIONS)
    found = {
        "is_equal": [torch.equal(*pair) for pair in zip(spread, logits_of(whole), strict=True)],
        "bytes_read": [report["bytes_read"] for report in reports],
        "weight_bytes": [report["memory"]["weight_bytes"] for report in reports],
        "slots": [report["slots_per_layer"] for report in reports],
        "whole_bytes_read": whole.offload.report()["bytes_read"],
    }
    (place / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
