"""Moving the resident weights: the same numbers elsewhere, ties intact, and a running model none the wiser."""

import pytest
import torch
from torch import nn

from offload.compute.matvec import Matvecs
from offload.compute.resident import move_to_huge_pages, store_linears, weight_bytes
from offload.formats.compression import CompressedMatrix
from offload.formats.resident.stored_weight import StoredWeight


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


@pytest.fixture
def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 96), nn.Linear(96, 40)).bfloat16()


def test_compressed_linear_layers_compute_the_same_bits(linears):
    x_BSD = torch.randn(2, 3, 128).bfloat16()
    expected, nbytes = linears(x_BSD), weight_bytes(linears)
    store_linears(linears, CompressedMatrix())
    assert [isinstance(linear.weight, StoredWeight) for linear in linears] == [True, True, False]
    assert weight_bytes(linears) < 0.85 * nbytes
    assert torch.equal(linears(x_BSD), expected)
    with torch.inference_mode():
        assert torch.equal(linears(x_BSD), expected)


def test_a_compressed_weight_is_any_other_tensor_to_others(linears):
    plain = linears[0].weight.detach().clone()
    store_linears(linears, CompressedMatrix())
    weight = linears[0].weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (plain.shape, plain.dtype, plain.device)
    assert torch.equal(weight + 1, plain + 1)
    assert torch.equal(weight.t() @ plain, plain.t() @ plain)
    assert torch.equal(weight[3:7, ::2], plain[3:7, ::2])
    assert torch.equal(weight.float(), plain.float())
    assert isinstance(linears.state_dict()["0.weight"], StoredWeight)
    assert "StoredWeight" in repr(weight)


def test_a_compressed_weight_cannot_be_written_to(linears):
    store_linears(linears, CompressedMatrix())
    with torch.no_grad():
        for write in (
            lambda weight: weight.mul_(2),
            lambda weight: weight.copy_(weight + 1),
            lambda weight: weight.zero_(),
        ):
            with pytest.raises(RuntimeError, match="would change a compressed weight"):
                write(linears[0].weight)


def test_single_tokens_are_multiplied_without_expanding(linears, monkeypatch):
    x_1D = torch.randn(1, 128).bfloat16()
    expected = linears[0](x_1D)
    store_linears(linears, CompressedMatrix())
    matvecs = Matvecs("exact")
    out_1F = torch.empty(1, 64, dtype=torch.bfloat16)
    if not matvecs.multiply(x_1D, (linears[0].weight,), (out_1F,)):
        pytest.skip("torch's products of one row have other bits here, or there is no C compiler")
    monkeypatch.setattr(StoredWeight, "expanded", lambda weight: pytest.fail("expanded"))
    out_1F.zero_()
    assert matvecs.multiply(x_1D, (linears[0].weight,), (out_1F,))
    assert torch.equal(out_1F, expected)
    assert not matvecs.multiply(x_1D, (linears[0].weight, torch.randn(64, 128).bfloat16()), (out_1F, out_1F.clone()))


def test_what_embeddings_share_stays_plain():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 128), nn.Linear(128, 64, bias=False)
            self.head.weight = self.embed.weight

    model = Tied().bfloat16()
    store_linears(model, CompressedMatrix())
    assert model.head.weight is model.embed.weight
    assert not isinstance(model.head.weight, StoredWeight)


def test_compressed_weights_stay_where_they_are(linears):
    store_linears(linears, CompressedMatrix())
    place = linears[0].weight.stored.data_ptr()
    move_to_huge_pages(linears)
    assert linears[0].weight.stored.data_ptr() == place
