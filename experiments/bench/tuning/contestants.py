"""One contestant of `expertier bench finetune`, in a process of its own under the limit: open, and do some steps."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offload import PackedRows, fine_tune, parse_size

from ..offloading.contestants import weights_room
from .work import RATE, Work


def trace_rows(checkpoint: str, length: int) -> PackedRows:
    """Tokens in the order of their ids, which route as the rows of the trace one after the other."""
    vocabulary = int(json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    count = max(vocabulary // length, 1)
    token_NS = (np.arange(count * length) % vocabulary).reshape(count, length)
    return PackedRows(token_NS, token_NS, "rows of the trace")


def kernel_bytes() -> tuple[int, int]:
    """What this process has had read from the disk and written to it, by the kernel's count."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(": ") for line in lines)
    return int(found["read_bytes"]), int(found["write_bytes"])


class Stopwatch:
    """Seconds, bytes and losses of steps, one lap each."""

    def __init__(self) -> None:
        self.laps: list[dict[str, Any]] = []
        self._started, self._before = time.perf_counter(), kernel_bytes()

    def lap(self, loss: float, bytes_read: int | None = None, bytes_written: int | None = None) -> None:
        """A step has ended; what it moved by the contestant's own count, if it has one."""
        now, io = time.perf_counter(), kernel_bytes()
        row = {"seconds": now - self._started, "loss": loss, "bytes_read": bytes_read, "bytes_written": bytes_written}
        row |= {"kernel_read": io[0] - self._before[0], "kernel_written": io[1] - self._before[1]}
        self.laps.append(row)
        self._started, self._before = now, io

    @property
    def since_last_s(self) -> float:
        """Seconds since the last step."""
        return time.perf_counter() - self._started


def ours(method: str, work: Work, cache_experts: int | None = None) -> dict[str, Any]:
    """Steps of a method, and the commit after them, which forces everything to the disk."""
    watch = Stopwatch()
    # interrupted after its last step, a run commits and writes no model
    with contextlib.suppress(KeyboardInterrupt):
        fine_tune(
            work.checkpoint,
            trace_rows(work.checkpoint, work.sequence_length),
            Path(work.scratch) / f"{method}-{cache_experts}",
            work.options(method),
            cache_experts=cache_experts,
            cpu_memory="auto" if work.limit == "none" else parse_size(work.limit),
            advance=lambda row: watch.lap(row["loss"], row["bytes_read"], row["bytes_written"]),
            is_interrupted=lambda: len(watch.laps) >= work.steps,
        )
    return {"steps": watch.laps, "commit_s": watch.since_last_s}


def accelerate(work: Work) -> dict[str, Any]:
    """PEFT's LoRA on a model that accelerate keeps on the disk, layers computed again in the backward pass.

    It runs where all weights fit. What accelerate keeps on the disk is a tensor without data outside its own forward
    pass: PEFT's parametrisation of experts fails on those, and with linear layers alone the backward pass does.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    room = {} if work.limit == "none" else {"max_memory": {"cpu": weights_room(work.limit)}}
    folder = str(Path(work.scratch) / "accelerate")
    model = AutoModelForCausalLM.from_pretrained(work.checkpoint, device_map="auto", offload_folder=folder, **room)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    experts = {".".join(name.split(".")[-3:]) for name, _ in model.named_parameters() if ".experts." in name}
    config = LoraConfig(r=work.rank, lora_alpha=16, target_modules="all-linear", target_parameters=sorted(experts))
    peft = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([value for value in peft.parameters() if value.requires_grad], lr=RATE)
    rows, watch = trace_rows(work.checkpoint, work.sequence_length), Stopwatch()
    for step in range(work.steps):
        total = 0.0
        for ids, labels in rows.batches(step, work.options("lora")):
            loss = peft(input_ids=ids, labels=labels, use_cache=False).loss / work.accumulation
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        watch.lap(total)
    return {"steps": watch.laps, "commit_s": 0.0}


CONTESTANTS: Mapping[str, Callable[[Work], dict[str, Any]]] = {
    "zo": lambda work: ours("zo", work),
    "lora": lambda work: ours("lora", work),
    "full": lambda work: ours("full", work),
    "accelerate": accelerate,
}
"""`zo`, `lora` and `full` are ours."""


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(json.dumps(CONTESTANTS[sys.argv[1]](Work(**json.loads(sys.argv[2])))))
