"""Routing: its invariants hold or are refused."""

import pytest
import torch

from routing import Routing


def make(expert_TK, weight_TK=None, num_experts=3, num_zero_compute=2):
    expert_TK = torch.tensor(expert_TK)
    weight_TK = torch.ones(expert_TK.shape) if weight_TK is None else torch.tensor(weight_TK)
    return Routing(expert_TK=expert_TK, weight_TK=weight_TK, num_experts=num_experts, num_zero_compute=num_zero_compute)


def test_ids_are_ffn_then_zero_compute_then_empty():
    routing = make([[0, 2], [3, 4], [5, 1]], [[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    assert routing.num_routable == routing.empty_id == 5
    assert routing.count_R.tolist() == [1, 1, 1, 1, 1]
    expert_TK, weight_TK = routing.validate().ffn_view()
    assert expert_TK.tolist() == [[0, 2], [3, 3], [3, 1]]
    assert weight_TK.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.0, 1.0]]


def test_drop_empties_slots_and_keeps_the_others_gradient():
    weight_TK = torch.tensor([[0.25, 0.75]], requires_grad=True)
    routing = Routing(expert_TK=torch.tensor([[1, 0]]), weight_TK=weight_TK, num_experts=3)
    dropped = routing.drop(torch.tensor([[True, False]]))
    assert dropped.expert_TK.tolist() == [[3, 0]]
    dropped.validate().weight_TK.sum().backward()
    assert weight_TK.grad.tolist() == [[0.0, 1.0]]
    assert routing.expert_TK.tolist() == [[1, 0]], "the original is frozen"


@pytest.mark.parametrize(
    ("expert_TK", "weight_TK", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3), r"int64 \[T, K\]"),
        (torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2), "int32"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), r"\(3, 2\)"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), "floating point"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(expert_TK, weight_TK, message):
    with pytest.raises(ValueError, match=message):
        Routing(expert_TK=expert_TK, weight_TK=weight_TK, num_experts=4)


def test_validate_refuses_ids_out_of_range_and_weighted_empty_slots():
    with pytest.raises(ValueError, match=r"0\.\.5; got 0\.\.6"):
        make([[0, 6]]).validate()
    with pytest.raises(ValueError, match=r"-1\.\.0"):
        make([[0, -1]]).validate()
    with pytest.raises(ValueError, match="empty slots"):
        make([[0, 5]]).validate()
