"""One contestant of `expertier bench offload`, in a process of its own under the limit: load, prefill, decode."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from offload import parse_size, quantise, write_pack

from .catalogue import Contestant, find_contestant
from .gguf_file import gguf_of
from .llama_cpp import LlamaCpp

# What accelerate may fill with weights: three quarters of the limit less 1 GiB. The rest is for the process itself and
# the layer that is being read. Chosen once, not tuned.
WEIGHTS_SHARE, WORKING_BYTES = 0.75, 1 << 30


class TransformersEngine:
    """A transformers model with its cache of keys and values."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None

    def __call__(self, ids: list[int]) -> Any:
        """Continue with these tokens; gives the logits after the last."""
        output = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return output.logits[0, -1].float()

    def forget(self) -> None:
        """Begin anew with an empty context."""
        self._cache = None


def contest(name: str, checkpoint: Path, limit: str, prefill: int, decode: int, predictor: str = "") -> dict[str, Any]:
    """Decode along the trace.

    Prefetching by the next layer's gate stays off: a replay checkpoint marks the experts of all layers in one hidden
    state, so that such a guess would always be right here.
    """
    started = time.perf_counter()
    if find_contestant(name).engine == "llama.cpp":
        threads, is_repacked = torch.get_num_threads(), limit == "none"
        offload: Any = None
        engine: TransformersEngine | LlamaCpp = LlamaCpp(
            gguf_of(checkpoint), prefill + decode, threads, is_repacked=is_repacked
        )
    else:
        model = load_model(name, checkpoint, limit, prefill + decode, predictor)
        offload, engine = getattr(model, "offload", None), TransformersEngine(model)
    load_s = time.perf_counter() - started
    step_s: list[float] = []
    after_prefill: dict[str, Any] = {}
    with torch.inference_mode():
        started = time.perf_counter()
        logits = engine(list(range(prefill)))
        prefill_s = time.perf_counter() - started
        if offload is not None:
            after_prefill = offload.report()
            offload.reset()
        for token in range(prefill, prefill + decode):
            started = time.perf_counter()
            logits = engine([token])
            step_s.append(time.perf_counter() - started)
        measured: dict[str, Any] = {
            "load_s": load_s,
            "prefill_s": prefill_s,
            "step_s": step_s,
            "logits": logits[:4].tolist(),
        }
        if offload is not None:
            measured |= _offloaded(after_prefill, offload.report(), step_s)
        if limit == "none":
            measured["prefill_again_s"] = _prefill_again(engine, prefill)
    return measured


def _prefill_again(engine: TransformersEngine | LlamaCpp, prefill: int) -> float:
    """Seconds of the same prompt with all weights in memory; the first one reads them from the disk."""
    engine.forget()
    started = time.perf_counter()
    engine(list(range(prefill)))
    return time.perf_counter() - started


def _offloaded(after_prefill: dict[str, Any], report: dict[str, Any], step_s: list[float]) -> dict[str, Any]:
    return {
        "hit_rate": report["hit_rate"],
        "bytes_per_token": report["bytes_read"] / len(step_s),
        "bytes_missed_per_token": report["bytes_missed"] / len(step_s),
        "prefill_bytes": after_prefill["bytes_read"],
        "peak_rss_bytes": report["peak_memory_bytes"],
        "compute_s": report["compute_s"],
        "stall_s": report["stall_s"],
        "prefetch": report["prefetch"],
        "io_and_compute_share": (report["compute_s"] + report["stall_s"]) / sum(step_s),
    }


def load_model(name: str, checkpoint: Path, limit: str, context: int, predictor: str = "") -> Any:
    """The model of a contestant that runs in torch.

    Args:
        name: a key of CONTESTANTS, but for llama.cpp.
        checkpoint: folder of a replay checkpoint.
        limit: memory, such as `6GiB`, or `none`.
        context: tokens that the caches will hold.
        predictor: file for contestants that prefetch; empty for the others.

    Raises:
        ValueError: if there is no such contestant, or it runs in another program.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    row = find_contestant(name)
    if row.engine == "ours":
        import offload

        memory: Any = "auto" if limit == "none" else parse_size(limit)
        options = {"context": context, **_options(row, checkpoint, predictor)}
        return offload.load(checkpoint, cpu_memory=memory, **options)
    if row.engine == "transformers":
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    if row.engine == "accelerate":
        folder = tempfile.mkdtemp(prefix="expertier-accelerate-", dir=os.environ.get("TMPDIR"))
        room = {"cpu": weights_room(limit)}
        return transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, device_map="auto", max_memory=room, offload_folder=folder
        ).eval()
    raise ValueError(f"{name} runs in {row.engine}, not in torch")


def weights_room(limit: str) -> int:
    """Bytes that accelerate may fill with weights under a memory limit such as `6GiB`."""
    return int(parse_size(limit) * WEIGHTS_SHARE) - WORKING_BYTES


def copy_of(checkpoint: Path, form: str) -> Path:
    """The packed copy of the experts in a checkpoint's folder, written when it is not there or older."""
    file, index = checkpoint / f"experts.{form}", checkpoint / "model.safetensors.index.json"
    if file.is_file() and file.stat().st_mtime >= index.stat().st_mtime:
        return file
    if form == "compressed":
        return write_pack(checkpoint, file, is_compressed=True)
    quantise(checkpoint, file, form=form)
    return file


def _options(row: Contestant, checkpoint: Path, predictor: str) -> dict[str, Any]:
    """What a row adds to the defaults of `offload.load`."""
    options = dict(row.arguments)
    if row.copy:
        options["pack"] = copy_of(checkpoint, row.copy)
    if row.is_ahead:
        options["prefetch"] = predictor
    return options


if __name__ == "__main__":
    name, folder, limit, *counts, predictor = sys.argv[1:]
    print(json.dumps(contest(name, Path(folder), limit, *map(int, counts), predictor)))
