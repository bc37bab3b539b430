"""Muon: the published equations, torch's own class matrix by matrix, which parameter goes where, and exact resuming."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.optim import Muon

from experiments.train.optimisers.bank_muon import BankMuon, orthogonalised
from experiments.train.optimisers.build import build_optimizer
from experiments.train.run_folder import checkpoints
from experiments.train.torch_run import train
from moe import MoEConfig, MoEForCausalLM


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (32, 32)])
def test_five_steps_bring_singular_values_near_one_and_keep_the_directions(shape):
    matrix = torch.randn(3, *shape)
    found = orthogonalised(matrix).float()
    value = torch.linalg.svdvals(found)
    assert ((value > 0.3) & (value < 1.3)).all()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert ((found * (left @ right)).sum((-2, -1)) / found.norm(dim=(-2, -1)) / min(shape) ** 0.5 > 0.95).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_bank_moves_as_torchs_muon_moves_each_of_its_matrices(parts):
    bank = torch.nn.Parameter(torch.randn(3, 12, 10))
    pieces = [torch.nn.Parameter(piece.clone()) for one in bank.detach() for piece in one.chunk(parts)]
    ours = BankMuon([{"params": [bank], "parts": parts}], lr=0.02, weight_decay=0.1, momentum=0.9)
    theirs = Muon(pieces, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        bank.grad = torch.randn_like(bank)
        grads = [piece for one in bank.grad for piece in one.chunk(parts)]
        for piece, grad in zip(pieces, grads, strict=True):
            piece.grad = grad.clone()
        ours.step()
        theirs.step()
    whole = torch.stack([torch.cat(pieces[i : i + parts]) for i in range(0, len(pieces), parts)])
    moved = 3 * 0.02 * 0.2  # each step moves an entry by so much on average
    assert (bank - whole).abs().max() < 0.05 * moved  # both compute in bfloat16, in different orders


def test_an_update_has_the_size_of_adamws():
    bank = torch.nn.Parameter(torch.zeros(2, 64, 48))
    bank.grad = torch.randn_like(bank)
    BankMuon([bank], lr=1.0, weight_decay=0.0, momentum=0.95).step()
    assert bank.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_embeddings_head_routers_and_norms_stay_with_adamw(tiny_training):
    model = MoEForCausalLM(MoEConfig(**tiny_training.model, num_shared_experts=1))
    optimizer = build_optimizer(model, replace(tiny_training, optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        part: {names[id(p)] for group in one.param_groups for p in group["params"]}
        for part, one in optimizer.parts.items()
    }
    assert sorted(name for group in found.values() for name in group) == sorted(names.values())
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= found["adamw"]
    assert all("router" in name or "norm" in name or "embed" in name or "head" in name for name in found["adamw"])
    assert found["bank_muon"] == {
        f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")
    }
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.shared.up_proj.weight"} <= found["muon"]
    halves = {id(p): group["parts"] for group in optimizer.parts["bank_muon"].param_groups for p in group["params"]}
    assert {names[key].rsplit(".", 1)[1]: parts for key, parts in halves.items()} == {"gate_up_proj": 2, "down_proj": 1}


def test_a_run_with_muon_learns_and_resumes_bit_by_bit(tmp_path, corpus, tiny_training):
    config = replace(tiny_training, optimizer="muon", learning_rate=0.02)
    whole = train(config, corpus, tmp_path / "whole", quiet=True)
    train(config, corpus, tmp_path / "cut", quiet=True)
    for folder in checkpoints(tmp_path / "cut")[1:]:
        shutil.rmtree(folder)
    resumed = train(config, corpus, tmp_path / "cut", quiet=True, resume=True)
    assert resumed.held_out_bits_per_byte == whole.held_out_bits_per_byte
    states = [MoEForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_bank_takes_no_closure():
    with pytest.raises(ValueError, match="closure"):
        BankMuon([torch.nn.Parameter(torch.zeros(1, 2, 2))], lr=1.0, weight_decay=0.0, momentum=0.9).step(lambda: 0.0)
