"""Experts that come one after the other in cache slots, against all at once: the same bits."""

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels import ExpertWeights, compute_experts, in_parts, operators, rows_in_parts
from moe.kernels.decode import rows as decode_module
from moe.kernels.weights.activation import Activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
E, K, C = 5, 2, 2
GPT_OSS = Activation("silu", alpha=1.702, limit=7.0, shift=1.0)


@pytest.fixture(autouse=True)
def many_rows_are_more_than_ten(monkeypatch):
    """Both paths at sizes that the interpreter computes quickly."""
    for module in (in_parts, operators):
        monkeypatch.setattr(module, "MAX_ROWS", 10)


def layer(T, D=24, F=16, dtype=torch.float32):
    def draw(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    expert_TK = torch.stack([torch.randperm(E, device=DEVICE)[:K] for _ in range(T)])
    expert_TK[0, 0] = E
    return (
        draw(T, D),
        expert_TK,
        torch.rand(T, K, device=DEVICE),
        [draw(E, 2 * F, D), draw(E, D, F), draw(E, 2 * F), draw(E, D)],
    )


def in_slots(tensors, experts, num_slots):
    """The weights of some experts in slots from the last on, NaN in the slots of nobody."""
    pools = [
        torch.full((num_slots, *tensor.shape[1:]), torch.nan, device=DEVICE, dtype=tensor.dtype) for tensor in tensors
    ]
    slot_E = torch.full((E,), -1, dtype=torch.int32, device=DEVICE)
    for place, expert in enumerate(experts):
        slot_E[expert] = num_slots - 1 - place
        for pool, tensor in zip(pools, tensors, strict=True):
            pool[num_slots - 1 - place] = tensor[expert]
    return ExpertWeights(*pools, GPT_OSS, is_halves=False, slot_E=slot_E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, pytest.param(3, marks=pytest.mark.slow), 12], ids=["one", "few", "many"])
def test_any_grouping_in_any_number_of_slots_has_the_bits_of_all_at_once(guarded_memory, T, dtype):
    x, expert, combine, tensors = layer(T, dtype=dtype)
    expected = compute_experts(x, expert, combine, ExpertWeights(*tensors, GPT_OSS, is_halves=False))
    for parts, num_slots in (([[4, 0], [2], [3, 1]], C), ([[1, 3, 2], [], [0, 4]], 7), ([[0, 1, 2, 3, 4]], E)):
        rows = rows_in_parts(x, expert, in_slots(tensors, [], num_slots))
        for experts in parts:
            rows.compute(in_slots(tensors, experts, num_slots))
        assert torch.equal(rows.combine(combine), expected)


@pytest.mark.parametrize("T", [3, 12], ids=["few", "many"])
def test_rows_that_were_computed_elsewhere(tolerance, monkeypatch, T):
    monkeypatch.setattr(decode_module, "num_processors", lambda device: 1000)
    x, expert, combine, tensors = layer(T, D=160)
    weights = ExpertWeights(*tensors, GPT_OSS, is_halves=False)
    expected = compute_experts(x, expert, combine, weights)
    rows = rows_in_parts(x, expert, in_slots(tensors, [], C))
    rows.compute(in_slots(tensors, [0, 1], C))
    rows.compute(in_slots(tensors, [3, 4], C))
    row_n = (expert.reshape(-1) == 2).nonzero()[:, 0]
    ones = torch.ones(len(row_n), 1, device=DEVICE)
    alone = torch.full((len(row_n), 1), 2, device=DEVICE)
    rows.put(row_n, compute_experts(x[row_n // K], alone, ones, weights))
    torch.testing.assert_close(rows.combine(combine), expected, **tolerance[torch.float32])
