"""`offload.load`: an ordinary transformers model whose experts stay on disk and visit RAM slots."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

import moe  # noqa: F401  registers our own model type with transformers

from ..checkpoint.experts import experts_modules
from ..compute.adapters import load_adapter
from ..compute.resident import move_to_huge_pages
from ..gpu.devices import open_lane
from ..memory.budget import resident_bytes
from ..memory.heap import keep_few_products, return_free_blocks, return_large_blocks
from .assembly import assemble
from .depths import Deepening, with_depth
from .division import choose_units, choose_window, divide_memory, expect_machine_has, stored_shapes
from .opening import open_checkpoint
from .options import LoadOptions, Part


def load(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    gpu_memory: str | int = "auto",
    cpu_memory: str | int = "auto",
    cache_experts: int | None = None,
    gpu_experts: int | None = None,
    policy: str = "auto",
    io: str = "auto",
    io_threads: int = 4,
    dtype: str | torch.dtype = "auto",
    context: int = 2048,
    arithmetic: str = "auto",
    pack: str | Path | None = None,
    depth: int | str = "all",
    prefetch: str | Path = "auto",
    plan: str | Path | None = None,
    node: int | None = None,
    record_trace: bool = False,
    adapter: str | Path | None = None,
    resident_layers: int | None = None,
    layers_ahead: int | None = None,
    cache_units: int | None = None,
    peer_memory: str | int | None = None,
    part: Part | None = None,
) -> Any:
    """Load a model without ever holding all of it in memory: not all experts, nor all layers if they do not fit.

    Args:
        path_or_id: a Hugging Face model folder with safetensors weights, or a model id.
        device: `"cuda"` puts everything outside experts on the GPU and adds a tier of GPU slots; `"auto"` does so if
            `gpu_memory` names a size, and is the CPU otherwise. `"simulated"` computes on the CPU as if experts came
            over a wire of 16 GB/s; `model.offload.lane.stall_s` says how long that would have been waited for.
        gpu_memory: the whole budget on the GPU, such as `"8GiB"`; `"auto"` takes 90 % of what is free.
        cpu_memory: the whole budget of the process, such as `"6GiB"`; `"auto"` takes 90 % of what the machine and the
            control group leave.
        cache_experts: RAM slots per MoE layer instead of what a budget pays for.
        gpu_experts: GPU slots per MoE layer instead of what a budget pays for.
        policy: cache policy by name (see CACHES), or `"auto"`.
        io: `"direct"` reads past the page cache, `"cached"` through it, `"auto"` decides (see io_mode.py).
        io_threads: reads in flight at most.
        dtype: dtype of the running model; `"auto"` is that of the checkpoint.
        context: tokens, prompt and answer together, that the budget keeps room for: their KV cache, and what a layer
            holds while a prompt passes. A batch counts with the tokens of all its sequences. Longer ones run, above
            the budget. `generate` keeps the logits of the last position only; a direct call keeps those of all, which
            the budget does not count: pass `logits_to_keep=1`.
        arithmetic: what is promised of the model's bits. `"exact"`: those of the resident model. `"fixed"`: the same at
            every budget, batch and number of threads, of our own products. `"fast"`: nothing; with a GPU the CPU then
            computes a share of the experts that are not there. `"auto"`: exact where that is not slower than the
            resident model on this processor, else fixed; `model.offload.report()["arithmetic"]` says which.
        pack: a packed copy of the experts (see write_pack) to read instead of the checkpoint's own files; or a bundle
            of hidden units (`pack --bundle`), of the experts or of a dense model's feed-forwards.
        depth: of a packed copy in levels, how many of each expert are read: a number, `"all"`, or as many as
            `cpu_memory` holds with all experts in memory (`"auto"`), those first that gain most for their bytes. Or a
            rule that chooses while the model runs, lossy: `"weight"` reads experts that miss in few levels where their
            routing weight is small (`"weight:0.6,0.9"` are the sums of larger weights up to which they are read whole,
            and read at all); `"hottest"` deepens the hottest experts of each layer (`"hottest:8"`: so many) while
            nothing else is read; `"router"` asks the gates of `expertier pack --router-bits`. On the CPU only.
        prefetch: `"gate"`, `"transitions"` or a predictor file (.npz, `expertier trace predictor`) reads what the next
            layers will probably need while the disk is idle, and stops when it does not pay; `"plan"` reads what the
            model's routers have decided ahead (pre-gated and resident routers, one router for all layers); `"off"` does
            not. `"auto"` is `"plan"` with resident routers, whose experts stay in slots, else `"off"`.
        plan: a plan of `expertier place tiers`: how many slots each layer gets, and the experts that are in them from
            the start. GPU slots hold those that the plan puts there, whatever else is used; without a GPU they belong
            in RAM. Or a routing trace of the model (.npz): layers where a slot saves more misses get more slots.
        node: which node of a plan of several this machine is, from 0 on. Experts of other nodes count as on its disk.
            One process runs one GPU, which holds the experts of all GPUs of the node.
        record_trace: record the routing; `model.offload.trace()` gives it.
        adapter: a folder with a LoRA adapter in PEFT's format, such as `expertier finetune` writes. It is not merged:
            experts stay as they are stored, and each product with an adapted matrix gets its two thin ones besides. On
            the CPU only.
        resident_layers: decoder layers that stay in memory, the head counting as one; the others are streamed from the
            checkpoint in order of use. None keeps as many as the budget holds, which are all if it is large enough.
        layers_ahead: streamed layers that are read while one is computed, 0 or more; None chooses up to 2.
        cache_units: of a bundle (`pack --bundle`), hidden units of each layer that stay in memory, 0 or more, instead
            of what a budget pays for; the experts of a layer share them.
        peer_memory: memory of another GPU, such as `"8GiB"`: experts that the first one gives up go there and come back
            from there, before RAM and disk are asked.
        part: the experts that this process computes, where others compute the rest; None has all of the model.

    Returns:
        The transformers model, in eval mode; `model.offload` is its Offload.

    Raises:
        ValueError: if the checkpoint is damaged or incomplete, its experts cannot be offloaded, or the budget is too
            small.
    """
    options = LoadOptions(
        path_or_id=path_or_id,
        device=device,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
        cache_experts=cache_experts,
        gpu_experts=gpu_experts,
        policy=policy,
        io=io,
        io_threads=io_threads,
        dtype=dtype,
        context=context,
        arithmetic=arithmetic,
        pack=pack,
        depth=depth,
        prefetch=prefetch,
        plan=plan,
        node=node,
        record_trace=record_trace,
        adapter=adapter,
        resident_layers=resident_layers,
        layers_ahead=layers_ahead,
        cache_units=cache_units,
        peer_memory=peer_memory,
        part=part,
    )
    expect_machine_has(options)
    return_large_blocks()
    keep_few_products()
    lane = open_lane(options.device, options.gpu_memory, options.gpu_experts)
    choose, is_multiplied = partial(choose_window, options=options), stored_shapes(options)
    opened = with_depth(open_checkpoint(options, choose, is_multiplied), options)
    opened = choose_units(opened, options)
    if (deepening := Deepening.of(opened, options)) is not None:
        opened = deepening.at_base(opened)

    def settle() -> int:
        """Move the resident weights to where they stay; what the process has then, without them on the CPU."""
        if lane is None:
            move_to_huge_pages(opened.model, opened.streamed)
            return_free_blocks()
            return opened.process_bytes
        opened.model.to(lane.device)
        return resident_bytes()

    division = divide_memory(opened, options, lane, settle)
    model = assemble(opened, division, options, lane, deepening=deepening)
    if adapter is not None:
        layers = [form.layer for form in opened.forms]
        load_adapter(model, adapter, layers, list(experts_modules(model).values()))
    return model
