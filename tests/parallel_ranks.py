"""What processes do together in the tests of `moe.parallel`; started by `run_ranks`, not collected by pytest."""

import copy
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from moe import Experts, MoEConfig, MoEForCausalLM
from moe.parallel import (
    Copies,
    DealtExperts,
    ExpertFailure,
    Move,
    MovingLayer,
    PlacedExperts,
    Questions,
    SlicedExperts,
    Traffic,
    answer_questions,
    dispatch,
    experts_modules,
    place_experts,
    slice_of,
)

E, D, F, K = 6, 16, 16, 3
HELD: list[list[int | None]] = [[4, 0, 2, 5], [1, 3, 4, 0]]
"""Experts 0 and 4 have two copies, in other places on each process."""


def bank(seed: int = 0) -> Experts:
    config = MoEConfig(num_experts=E, num_experts_per_tok=K, hidden_size=D, moe_intermediate_size=F)
    config._experts_implementation = "expertier"
    experts = Experts(config)
    experts._is_expert_parallel = True
    torch.manual_seed(seed)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts


def copies_of(held: list[list[int | None]]) -> Copies:
    turns_EG = torch.tensor([[int(expert in experts) for experts in held] for expert in range(E)])
    return Copies.of(held, turns_EG)


def difference(found: Tensor | None, right: Tensor | None) -> float:
    if found is None or right is None or right.numel() == 0:
        return float((found is None) != (right is None))
    return float((found - right).norm() / right.norm().clamp_min(1e-30)) if right.any() else float(found.abs().max())


def routings() -> dict[str, tuple[Tensor, Tensor]]:
    """Ids and weights [T, K] that differ between the processes; E is an empty slot."""
    generator = torch.Generator().manual_seed(10 + distributed.get_rank())
    rank = distributed.get_rank()

    def drawn(num_tokens: int) -> Tensor:
        return torch.rand(num_tokens, E, generator=generator).topk(K).indices

    with_holes = drawn(20)
    with_holes[3], with_holes[5, 1:] = E, E
    found = {
        "many": drawn(64),
        "one token": drawn(1),
        "empty slots": with_holes,
        "all empty": torch.full((4, K), E),
        "tokens on one process only": drawn(9 if rank == 0 else 0),
        "one expert": torch.tensor([[3, E, E]]).repeat(7, 1),
        "other widths": drawn(5)[:, : 1 + rank],
    }
    return {name: (ids, torch.rand(ids.shape, generator=generator)) for name, ids in found.items()}


def with_gradients(forward: Any, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_TD = torch.randn(len(ids), D, generator=torch.Generator().manual_seed(len(ids)), requires_grad=True)
    weights = weights.clone().requires_grad_()
    y_TD = forward(x_TD, ids, weights)
    (y_TD * torch.arange(1.0, D + 1)).sum().backward()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (x_TD, weights)]
    return y_TD.detach(), grads[0], grads[1]


def dispatched() -> dict[str, list[float]]:
    """Outputs and gradients of a dispatch to copies against whole experts; copies' gradients are summed."""
    group, rank, copies = distributed.group.WORLD, distributed.get_rank(), copies_of(HELD)
    own = torch.tensor(HELD[rank])
    found = {}
    for name, (ids, weights) in routings().items():
        whole, local = bank(), bank()
        local.num_experts = len(own)
        for parameter_name in ("gate_up_proj", "down_proj"):
            rows = getattr(whole, parameter_name).data[own].clone()
            setattr(local, parameter_name, torch.nn.Parameter(rows))

        def forward(x: Tensor, ids: Tensor, weights: Tensor, local: Experts = local) -> Tensor:
            place = copies.place(ids)
            return dispatch(x, *place, weights, local, group, empty_id=copies.slots)

        ours = with_gradients(forward, ids, weights)
        right = with_gradients(whole if len(ids) else lambda x, *_: x, ids, weights)
        errors = [difference(*pair) for pair in zip(ours, right, strict=True)]
        for parameter_name in ("gate_up_proj", "down_proj"):
            grad = getattr(local, parameter_name).grad
            summed = torch.zeros_like(getattr(whole, parameter_name)).index_add_(0, own, grad)
            wanted = getattr(whole, parameter_name).grad
            wanted = torch.zeros_like(summed) if wanted is None else wanted
            for tensor in (summed, wanted):
                distributed.all_reduce(tensor)
            errors.append(difference(summed, wanted))
        found[name] = errors
    return found


def models() -> dict[str, list[float]]:
    """Logits of whole models against placed ones, with a row per process and with a row per expert."""
    sizes = {"vocab_size": 50, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_experts_per_tok": 2, "head_dim": 8, "max_position_embeddings": 64}
    built = {
        "mixtral": MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=E, intermediate_size=F)),
        "gpt_oss": GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=E, intermediate_size=F)),
        "ours": MoEForCausalLM(
            MoEConfig(**sizes, num_experts=E, moe_intermediate_size=F, router="moepp", zero_compute_experts=["zero"])
        ),
    }
    found = {}
    for name, model in built.items():
        torch.manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.eval()
        rank = distributed.get_rank()
        token_BS = torch.randint(0, 50, (2 + rank, 9), generator=torch.Generator().manual_seed(rank))
        found[name] = []
        for rows in ("rank", "pair"):
            placed = copy.deepcopy(model)
            layers = len(experts_modules(placed))
            tables = [copies_of(HELD)] * layers
            place_experts(placed, [HELD] * layers, tables, distributed.group.WORLD, rows=rows)
            with torch.no_grad():
                right, ours = model(token_BS).logits, placed(token_BS).logits
            found[name].append(difference(ours, right))
    return found


def moved() -> dict[str, Any]:
    """Experts that go around between two processes while the same tokens are routed."""
    group, rank, whole = distributed.group.WORLD, distributed.get_rank(), bank()
    held: list[list[int | None]] = [[0, 1, 2], [3, 4, 5]]
    placed = PlacedExperts(bank(), held, copies_of(held), group)
    layer = MovingLayer(placed, held, copies_of)
    ids, weights = routings()["many"]
    x_TD = torch.randn(len(ids), D, generator=torch.Generator().manual_seed(rank))
    moves = [
        Move(expert=0, source=0, target=1),
        Move(expert=0, source=None, target=0),
        Move(expert=5, source=1, target=0),
        Move(expert=5, source=None, target=1),
        Move(expert=4, source=1, target=0),
    ]
    errors = []
    with torch.no_grad():
        right = whole(x_TD, ids, weights)
        for _ in layer.rounds(moves):
            errors.append(difference(placed(x_TD, ids, weights), right))
    return {
        "errors": errors,
        "held": layer.held,
        "moved_bytes": layer.moved_bytes,
        "most_held": layer.most_held,
        "expert_bytes": placed.expert_bytes,
    }


def counted() -> dict[str, Any]:
    """Traffic of a call that can be counted by hand."""
    rank = distributed.get_rank()
    traffic = Traffic(num_ranks=2, rank=rank)
    held: list[list[int | None]] = [[0, 1, 2], [3, 4, 5]]
    copies = copies_of(held)
    # three tokens: both processes, process 0 only, process 1 only with two experts
    ids = torch.tensor([[0, 3, E], [1, 2, E], [4, 5, E]])
    place = copies.place(ids)
    dispatch(
        torch.zeros(3, D),
        *place,
        torch.ones(3, K),
        lambda x, ids, weights: x,
        distributed.group.WORLD,
        empty_id=copies.slots,
        traffic=traffic,
    )
    return traffic.to_json() | {"remote_rows": traffic.remote_rows, "remote_bytes": traffic.remote_bytes}


def dealt() -> dict[str, bool]:
    """Whether experts dealt to two processes give the bits of one, and what a failing process says."""
    rank = distributed.get_rank()
    alone = [distributed.new_group([0]), distributed.new_group([1])][rank]
    rank_E = torch.tensor([1, 0, 1, 1, 0, 1])
    if rank:
        banks = {0: bank(), 1: bank().to(torch.bfloat16)}

        def compute(layer: int, x_ND: Tensor, expert_N: Tensor) -> Tensor:
            return banks[layer](x_ND, expert_N[:, None], torch.ones(len(expert_N), 1))

        answer_questions(compute, lambda: "process 1 is well", distributed.group.WORLD)
        return {}
    generator = torch.Generator().manual_seed(7)
    found, questions = {}, Questions(distributed.group.WORLD)
    for layer, dtype in enumerate((torch.float32, torch.bfloat16)):
        for num_tokens in (1, 2, 40):
            ids = torch.rand(num_tokens, E, generator=generator).topk(K).indices
            ids[0, 1] = E
            x_TD = torch.randn(num_tokens, D, generator=generator).to(dtype)
            weights = torch.rand(num_tokens, K, generator=generator)
            outputs = []
            for owners, asked in ((rank_E, questions), (torch.zeros(E, dtype=torch.int64), Questions(alone))):
                experts = bank().to(dtype)
                DealtExperts(experts, layer, owners, asked)
                with torch.no_grad():
                    outputs.append(experts.forward(x_TD, ids, weights))
            with torch.no_grad():
                right = bank().to(dtype)(x_TD, ids, weights).float()
            is_right = difference(outputs[0].float(), right) < (1e-6 if dtype == torch.float32 else 1e-2)
            found[f"{dtype}, {num_tokens} tokens"] = torch.equal(*outputs) and is_right
    lost = bank()
    DealtExperts(lost, 7, rank_E, questions)
    with pytest.raises(ExpertFailure, match="process 1: KeyError: 7"), torch.no_grad():
        lost.forward(x_TD, ids, weights)
    found["after a failure"] = questions.reports() == ["process 1 is well"]
    questions.stop()
    return found


def sliced() -> dict[str, Any]:
    """Experts of which each process has half of the hidden units, against whole ones: values and every gradient."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(3)
    given = [torch.randn(9, D), torch.rand(9, K)]
    ids, seed = torch.stack([torch.randperm(E + 1)[:K] for _ in range(9)]), torch.randn(9, D)
    whole, own = bank(), SlicedExperts(slice_of(bank(), rank, count))
    results = []
    for experts in (whole, own):
        x_TD, weight_TK = (tensor.clone().requires_grad_() for tensor in given)
        y_TD = experts(x_TD, ids, weight_TK)
        (y_TD * seed).sum().backward()
        results.append((y_TD.detach(), x_TD.grad, weight_TK.grad))
    pairs = list(zip(*results, strict=True))
    gate, up = (half.chunk(count, dim=1)[rank] for half in whole.gate_up_proj.grad.chunk(2, dim=1))
    pairs.append((torch.cat([gate, up], dim=1), own.bank.gate_up_proj.grad))
    pairs.append((whole.down_proj.grad.chunk(count, dim=2)[rank], own.bank.down_proj.grad))
    return {"difference": max(difference(a, b) for a, b in pairs), "units": own.down_proj.shape[-1]}


def main() -> None:
    place = Path(os.environ["RANKS_FOLDER"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=count, timeout=timedelta(seconds=300)
    )
    own = {"dispatched": dispatched(), "models": models(), "moved": moved(), "counted": counted()}
    own["dealt"] = dealt()
    own["sliced"] = sliced()
    everyone: list[Any] = [None] * count
    distributed.all_gather_object(everyone, own)
    if rank == 0:
        (place / "found.json").write_text(json.dumps(everyone))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
