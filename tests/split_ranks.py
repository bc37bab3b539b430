"""What processes do together in the tests of split training; started by `run_ranks`, not collected by pytest."""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.multiprocessing.reductions import StorageWeakRef

from experiments.train.corpus import BatchOrder, Corpus, windows
from experiments.train.distributed import run
from experiments.train.distributed.checkpoint import load_parts, save_parts
from experiments.train.distributed.run import build_parts
from experiments.train.distributed.step import Parts, accumulate, distributed_evaluation, distributed_step
from experiments.train.presets import TrainConfig
from experiments.train.torch_run import build_model, seed_noise
from experiments.variants.catalogue import model_overrides
from moe import ARCHITECTURES, MoEConfig, MoEForCausalLM
from moe.parallel import Degree, Layout, average_gradients, degrees, expect_splittable
from routing import ROUTERS

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_dense_layers": 1,
}
OF_ROUTERS = {
    "switch": {"num_experts_per_tok": 1},
    "base": {"num_experts_per_tok": 1},
    "adamoe": {"zero_compute_experts": ["zero"] * 4},
    "moepp": {"zero_compute_experts": ["zero", "copy", "constant", "constant"]},
    "longcat": {"zero_compute_experts": ["copy"] * 4},
}
DEEP = SMALL | {"num_hidden_layers": 4, "num_dense_layers": 0}
OTHERS = ("chain-2", "recursive-2", "mor-expert-2", "latent", "read-me", "read-me-weighted")


def cases() -> dict[str, dict[str, Any]]:
    """Every router, and every architecture in one or more of its forms, by name."""
    found = {name: SMALL | {"router": name} | OF_ROUTERS.get(name, {}) for name in ROUTERS if name != "forced"}
    found |= {name: DEEP | model_overrides(name, DEEP) for name in OTHERS}
    for name in ("duo_llm", "feature_groups", "glider", "hydra", "mixture_of_transformers", "peer", "ultramem"):
        found[name] = DEEP | {"architecture": name} | dict(ARCHITECTURES[name].example)
    return found | {
        "tied": SMALL | {"tie_word_embeddings": True},
        "switch with noise": SMALL | {"router": "switch", "num_experts_per_tok": 1, "router_options": {"jitter": 0.1}},
        "shared experts": SMALL | {"num_shared_experts": 1, "router": "deepseek_v3"},
    }


def config_of(model: dict[str, Any], **settings: Any) -> TrainConfig:
    given = {"steps": 8, "batch_size": 2, "accumulation": 4, "sequence_length": 16, "precision": "float32"}
    given |= {"learning_rate": 1e-2, "warmup_steps": 0, "held_out_tokens": 160}
    return TrainConfig(model=model, **(given | settings))


def corpus_of(seed: int = 5) -> Corpus:
    tokens = np.random.default_rng(seed).integers(0, 64, 4096)
    return Corpus(train=tokens[:3072], held_out=tokens[3072:], vocab_size=64, tokens_per_byte=1.0, source="random")


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def one_process(config: TrainConfig) -> tuple[float, dict[str, Tensor | None]]:
    """Loss and gradients of the first step as one process computes them."""
    model, corpus = build_model(config, corpus_of(), CPU), corpus_of()
    model.to(torch.get_default_dtype())
    order = BatchOrder(windows(corpus.train, config.sequence_length), config.batch_size, config.seed)
    total = 0.0
    for micro in range(config.accumulation):
        token_BS = torch.from_numpy(order.batch(micro))
        seed_noise(config.seed, 0, micro)
        loss = model(token_BS, labels=token_BS, use_cache=False).loss / config.accumulation
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def worst_difference(config: TrainConfig, layout: Layout, spoil: Callable[[Parts], None] | None = None) -> list[Any]:
    """Relative differences from one process: of the loss, of the worst gradient, and which one that is."""
    parts = build_parts(config, corpus_of(), layout, CPU)
    if spoil is not None:
        spoil(parts)
    seen = accumulate(parts, 0)
    average_gradients(parts.split)
    loss, wanted = one_process(config)
    worst, where = 0.0, ""
    for name, parameter in parts.model.named_parameters():
        found, right = whole(parameter.grad), wanted[name]
        found, right = (torch.zeros(1) if grad is None else grad for grad in (found, right))
        size = right.norm().item()
        error = (found - right).norm().item() / (size or 1.0)
        if error > worst:
            worst, where = error, name
    return [abs(seen.loss - loss) / abs(loss), worst, where]


def difference_without_room(config: TrainConfig, layout: Layout) -> list[Any]:
    """`worst_difference` where weights are given back after the forward pass and gathered again."""
    share, run.GATHERED_SHARE = run.GATHERED_SHARE, 0.0
    try:
        return worst_difference(config, layout)
    finally:
        run.GATHERED_SHARE = share


def degree_differences(names: list[str]) -> dict[str, Any]:
    """`worst_difference` of every degree that so many processes can choose."""
    layout, found = Layout.parse("auto", distributed.get_world_size()), {}
    for name in names:
        for degree in degrees(layout.processes):
            found[f"{name} {degree}"] = worst_difference(
                config_of(cases()[name]), layout, lambda parts, degree=degree: parts.split.take(degree)
            )
    return found


def changing_degrees(model: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Losses of six steps under changing degrees, saved and read after three, and under one degree."""
    layout = Layout.parse("auto", distributed.get_world_size())
    choices = degrees(layout.processes)
    one, many, again = (build_parts(config_of(model), corpus_of(), layout, CPU) for _ in range(3))
    alone = [distributed_step(one, number, choices[0])["loss"] for number in range(6)]
    found = [distributed_step(many, number, choices[number % len(choices)])["loss"] for number in range(3)]
    if distributed.get_rank() == 0:
        folder.mkdir()
    distributed.barrier()
    save_parts(folder, 3, many.model, many.optimizer)
    load_parts(folder, again.model, again.optimizer)
    after = [distributed_step(again, number, choices[-number % len(choices)])["loss"] for number in range(3, 6)]
    return {"alone": alone, "changing": found + after}


def lent(model: dict[str, Any]) -> dict[str, list[int]]:
    """How many of the tensors that processes gathered of each other are still there, and how many there were."""
    parts = build_parts(config_of(model), corpus_of(), Layout.parse("auto", distributed.get_world_size()), CPU)
    parts.split.take(Degree(expert=1))
    gathered: list[StorageWeakRef] = []

    def watched(outputs: list[Tensor], *given: Any, **options: Any) -> Any:
        gathered.append(StorageWeakRef(outputs[0].untyped_storage()))
        return all_gather(outputs, *given, **options)

    def found() -> list[int]:
        # a thread of gloo lets go of a tensor a moment after its process has it
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not all(storage.expired() for storage in gathered):
            time.sleep(0.01)
        return [sum(not storage.expired() for storage in gathered), len(gathered)]

    token_BS = torch.zeros(2, 16, dtype=torch.int64)
    all_gather, distributed.all_gather = distributed.all_gather, watched
    try:
        loss = parts.model(token_BS, labels=token_BS, use_cache=False).loss
        forward = found()
        loss.backward()
        return {"forward": forward, "backward": found()}
    finally:
        distributed.all_gather = all_gather


def refused(model: dict[str, Any], layout: Layout) -> str | None:
    try:
        with torch.device("meta"):
            expect_splittable(MoEForCausalLM(MoEConfig(**model)), layout)
    except ValueError as error:
        return str(error)
    return None


def router_state(parts: Parts) -> Tensor:
    """Every buffer and parameter that all processes hold whole, as one vector."""
    tensors = [buffer for router in parts.model.model.routers for buffer in router.buffers()]
    return torch.cat([tensor.detach().double().flatten() for tensor in (*tensors, *parts.split.whole)])


def is_equal_everywhere(tensor: Tensor) -> bool:
    found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, tensor)
    return all(torch.equal(one, tensor) for one in found)


def equalities(layouts: list[str], names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        model = cases()[name]
        for text in layouts:
            layout = Layout.parse(text, distributed.get_world_size())
            if reason := refused(model, layout):
                found[f"{name} {text}"] = reason
                continue
            found[f"{name} {text}"] = worst_difference(config_of(model), layout)
    return found


def steps(parts: Parts, numbers: range) -> list[list[float]]:
    rows = [distributed_step(parts, number) for number in numbers]
    return [[row["loss"], row["gradient_norm"], row["max_vio"]] for row in rows]


def states(names: list[str], layout: Layout) -> dict[str, bool]:
    """Whether all processes hold the same routers after some steps."""
    found = {}
    for name in names:
        parts = build_parts(config_of(cases()[name]), corpus_of(), layout, CPU)
        steps(parts, range(3))
        found[name] = is_equal_everywhere(router_state(parts))
    return found


def save_and_go_on(model: dict[str, Any], layout: Layout, folder: Path) -> dict[str, Any]:
    """Train, save, train on; the same from the saved state."""
    parts = build_parts(config_of(model), corpus_of(), layout, CPU)
    before = steps(parts, range(3))
    if distributed.get_rank() == 0:
        folder.mkdir()
    distributed.barrier()
    save_parts(folder, 3, parts.model, parts.optimizer)
    after = steps(parts, range(3, 6))
    evaluation = distributed_evaluation(parts)
    return {"before": before, "after": after, "evaluation": evaluation, "resumed": go_on(model, layout, folder)}


def go_on(model: dict[str, Any], layout: Layout, folder: Path) -> list[list[float]]:
    parts = build_parts(config_of(model, seed=0), corpus_of(), layout, CPU)
    done = load_parts(folder, parts.model, parts.optimizer)
    return steps(parts, range(done, done + 3))


def spoil_divisor(parts: Parts) -> None:
    """A wrong divide factor: what frameworks got wrong (pytorch#160285, Megatron-LM#5956)."""
    for bank in parts.split.experts:
        bank.set_gradient_divide_factor(1.0)


SOME = ("rmoe", "moepp", "remoe", "soft_moe", "tied", "switch with noise")
"""Routers with a shared cell, zero-compute experts, a varying number of experts, slots; tied weights; noise."""


def two(folder: Path) -> dict[str, Any]:
    model = cases()["rmoe"]
    torch.set_default_dtype(torch.float64)
    found = {"float64": equalities(["expert=2"], list(SOME)) | equalities(["data=2"], ["rmoe", "ultramem"])}
    torch.set_default_dtype(torch.float32)
    found["float32"] = equalities(["expert=2"], ["rmoe"])
    found["float32"]["rmoe, gathered twice"] = difference_without_room(config_of(model), Layout(data=2))
    found["states"] = states(["loss_free"], Layout(expert=2)) | states(["peer"], Layout(data=2))
    uneven = config_of(cases()["deepseek_v3"], accumulation=3)
    found["degrees"] = degree_differences(["moepp"])
    found["lent"] = lent(cases()["remoe"])
    found["uneven"] = worst_difference(uneven, Layout(expert=2))
    found["saved"] = save_and_go_on(model, Layout(expert=2), folder / "two")
    found["without expert parallelism"] = go_on(model, Layout(data=2), folder / "two")
    found["from one process"] = go_on(model, Layout(expert=2), folder / "one")
    return found


def every(folder: Path) -> dict[str, Any]:
    names = list(cases())
    torch.set_default_dtype(torch.float64)
    unsplit = [name for name in names if refused(cases()[name], Layout(expert=2))]
    found = {"float64": equalities(["expert=2"], names) | equalities(["data=2"], unsplit)}
    torch.set_default_dtype(torch.float32)
    split = [name for name in names if name not in unsplit]
    found["float32"] = equalities(["expert=2"], split)
    found["states"] = states(split, Layout(expert=2)) | states(unsplit, Layout(data=2))
    return found


def four(folder: Path) -> dict[str, Any]:
    names, model = ["rmoe", "deepseek_v3", "moepp", "tied"], cases()["rmoe"]
    layouts = ["data=4", "data=2,expert=2", "expert=4"]
    found = {"float32": equalities(layouts, names), "degrees": degree_differences(["moepp", "remoe"])}
    found["spoiled"] = worst_difference(config_of(model), Layout(data=2, expert=2), spoil_divisor)
    found["changing"] = changing_degrees(model, folder / "changing")
    found["from two"] = go_on(model, Layout(data=2, expert=2), folder / "two")
    found["saved"] = save_and_go_on(model, Layout(data=2, expert=2), folder / "four")
    return found


def main() -> None:
    place = Path(os.environ["RANKS_FOLDER"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=count, timeout=timedelta(seconds=300)
    )
    found = {"two": two, "every": every, "four": four}[sys.argv[1]](Path(sys.argv[2]))
    if rank == 0:
        (place / "found.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
