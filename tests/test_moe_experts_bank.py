import pytest
import torch
from torch import nn

from moe import Experts, grouped_experts, swiglu_experts_reference

IMPLEMENTATIONS = ["eager", "grouped_mm", "expertier"]


def build(tiny_config, implementation, dtype, **sizes):
    config = tiny_config(**sizes)
    config._experts_implementation = implementation
    experts = Experts(config).to(dtype)
    experts._is_expert_parallel = True
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def routings(num_experts):
    """Name -> int64 [T, K]: typical, one token, an odd count, a single busy expert, empty slots."""
    last = num_experts
    return {
        "typical": torch.randint(num_experts, (40, 2)),
        "one-token": torch.tensor([[1, 4]]),
        "odd": torch.randint(num_experts, (63, 2)),
        "one-busy-expert": torch.full((17, 1), 3),
        "empty-slots": torch.tensor([[0, last], [last, last], [2, 1], [last, 5]]),
    }


@pytest.mark.parametrize("case", list(routings(6)))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_equals_the_reference_forward_and_backward(tiny_config, tolerance, implementation, case):
    dtype = torch.float32
    experts = build(tiny_config, implementation, dtype)
    expert_TK = routings(6)[case]
    weight_TK = torch.rand(expert_TK.shape, dtype=dtype).masked_fill(expert_TK >= 6, 0.0).requires_grad_()
    x_TD = torch.randn(len(expert_TK), 32, dtype=dtype, requires_grad=True)
    leaves = (x_TD, weight_TK, experts.gate_up_proj, experts.down_proj)
    y_TD = experts(x_TD, expert_TK, weight_TK)
    truth_TD = swiglu_experts_reference(x_TD, expert_TK, weight_TK, experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(y_TD, truth_TD, **tolerance[dtype])
    cotangent = torch.randn_like(y_TD)
    gradients = torch.autograd.grad(y_TD, leaves, cotangent)
    truths = torch.autograd.grad(truth_TD, leaves, cotangent)
    is_used_TK = expert_TK < 6
    for name, gradient, truth in zip(("x", "weight", "gate_up", "down"), gradients, truths, strict=True):
        if name == "weight":
            gradient, truth = gradient[is_used_TK], truth[is_used_TK]
        torch.testing.assert_close(gradient, truth, **tolerance[dtype], msg=lambda text, n=name: f"d{n}: {text}")


def test_grouped_path_in_fp64_passes_gradcheck(tiny_config):
    experts = build(tiny_config, "expertier", torch.float64, hidden_size=8, moe_intermediate_size=6)
    expert_TK = torch.tensor([[0, 1], [5, 6], [2, 0]])
    weight_TK = torch.rand(3, 2, dtype=torch.float64).masked_fill(expert_TK == 6, 0.0).requires_grad_()
    x_TD = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def run(x_TD, weight_TK, gate_up_proj, down_proj):
        parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return torch.func.functional_call(experts, parameters, (x_TD, expert_TK, weight_TK))

    assert torch.autograd.gradcheck(run, (x_TD, weight_TK, experts.gate_up_proj, experts.down_proj))


def test_bfloat16_stays_close_to_the_fp64_reference(tiny_config, tolerance):
    experts = build(tiny_config, "expertier", torch.bfloat16)
    expert_TK, x_TD = torch.randint(6, (50, 2)), torch.randn(50, 32, dtype=torch.bfloat16)
    weight_TK = torch.rand(50, 2)
    exact = swiglu_experts_reference(
        x_TD.double(), expert_TK, weight_TK.double(), experts.gate_up_proj.double(), experts.down_proj.double()
    )
    relative = (experts(x_TD, expert_TK, weight_TK).double() - exact).norm() / exact.norm()
    assert relative < tolerance[torch.bfloat16]["rtol"]


def test_rows_behind_the_last_expert_never_leak_uninitialised_memory(tiny_config):
    experts = build(tiny_config, "expertier", torch.float32)
    expert_TK = torch.full((8, 2), 6)
    x_TD = torch.randn(8, 32, requires_grad=True)
    y_TD = grouped_experts(experts, x_TD, expert_TK, torch.zeros(8, 2))
    y_TD.sum().backward()
    assert (y_TD == 0).all()
    assert (x_TD.grad == 0).all()
