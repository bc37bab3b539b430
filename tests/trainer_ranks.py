"""transformers' Trainer in one or several processes; started by `run_ranks`, not collected by pytest."""

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import Trainer, TrainingArguments

from moe import MoEConfig, MoEForCausalLM

ROUTERS_OF_RANKS = ("olmoe", "loss_free", "remoe")
"""Balanced by its loss, by a bias that follows counts, by a penalty that follows sparsity."""
STEPS, ROWS = 3, 4


def rows(count: int = 24, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(96, (length,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def steps_of(router: str, folder: Path, *, parts: int) -> dict[str, Any]:
    """Weights and routers' buffers after some steps of `parts` micro-batches in this process."""
    torch.manual_seed(1)
    model = MoEForCausalLM(
        MoEConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=6,
            router=router,
        )
    )
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=parts,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=settings, train_dataset=rows()).train()
    buffers = [buffer.detach().double().flatten() for router in model.model.routers for buffer in router.buffers()]
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
        "state": torch.cat([torch.zeros(1, dtype=torch.float64), *buffers]),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    place = Path(os.environ["RANKS_FOLDER"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=count, timeout=timedelta(seconds=300)
    )
    found = {}
    for router in ROUTERS_OF_RANKS:
        own = steps_of(router, Path(sys.argv[1]), parts=1)
        states = [torch.empty_like(own["state"]) for _ in range(count)]
        distributed.all_gather(states, own["state"])
        found[router] = {name: tensor.tolist() for name, tensor in own.items()}
        found[router]["is_equal"] = all(torch.equal(state, own["state"]) for state in states)
    if rank == 0:
        (place / "found.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
