"""Moving the resident weights: the same numbers elsewhere, ties intact, and a running model none the wiser."""

import torch
from torch import nn

from offload.huge_pages import move_to_huge_pages


def test_weights_keep_values_shapes_types_and_ties():
    model = nn.ModuleDict({"a": nn.Linear(33, 7), "b": nn.Linear(7, 33).bfloat16(), "c": nn.Embedding(5, 33)})
    model["tied"] = nn.Linear(33, 5, bias=False)
    model["tied"].weight = model["c"].weight
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    move_to_huge_pages(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert all(parameter.data_ptr() != addresses[name] for name, parameter in model.named_parameters())
    assert model["tied"].weight is model["c"].weight
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())


def test_weights_outlive_their_model_and_still_learn():
    model = nn.Linear(8, 8)
    move_to_huge_pages(model)
    model(torch.randn(2, 8)).sum().backward()
    weight, expected = model.weight, model.weight.detach().clone()
    del model
    assert torch.equal(weight, expected)
    assert weight.grad is not None


def test_nothing_to_move():
    move_to_huge_pages(nn.ReLU())


def test_a_kernel_without_huge_pages(monkeypatch):
    monkeypatch.setattr("mmap.MADV_HUGEPAGE", -1)  # an advice that no kernel knows
    model, x = nn.Linear(8, 8), torch.randn(1, 8)
    expected = model(x)
    move_to_huge_pages(model)
    assert torch.equal(model(x), expected)
