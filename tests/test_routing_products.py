"""Wide products without gradient, against the plain one in double precision."""

import pytest
import torch
from torch.nn.functional import linear

from routing import RouterSizes, RoutingContext, build_routers
from routing.products import FEWEST_ROWS, LEAST_WIDTH, narrow_linear

ROWS, WIDTH, OUTPUTS = FEWEST_ROWS + 5, LEAST_WIDTH + 3, 12


@pytest.fixture
def factors():
    return torch.randn(ROWS, WIDTH), torch.randn(OUTPUTS, WIDTH)


def test_error_is_that_of_a_float32_product(factors):
    """Not of bfloat16, which oneDNN uses where it is allowed to."""
    x, weight = factors
    exact = linear(x.double(), weight.double())
    found, plain = narrow_linear(x, weight), linear(x, weight)
    size = x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    of_found, of_plain = (((value - exact) / size).abs().max().item() for value in (found, plain))
    assert of_found < 2 * of_plain
    assert of_found < 2**-22


def test_rows_apart_in_memory(factors):
    x, weight = factors
    apart = torch.randn(ROWS, 2 * WIDTH)[:, ::2]
    torch.testing.assert_close(narrow_linear(apart, weight), linear(apart, weight))
    torch.testing.assert_close(narrow_linear(x.T.contiguous().T, weight), linear(x, weight))


@pytest.mark.parametrize("which", ["inputs", "weight"])
def test_gradients_flow_when_asked_for(factors, which):
    x, weight = factors
    leaf = (x if which == "inputs" else weight).requires_grad_()
    narrow_linear(x, weight).square().sum().backward()
    found, leaf.grad = leaf.grad, None
    linear(x, weight).square().sum().backward()
    torch.testing.assert_close(found, leaf.grad)
    with torch.no_grad():
        assert not narrow_linear(x, weight).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_to_torch(factors, dtype):
    x, weight = (factor.to(dtype) for factor in factors)
    assert torch.equal(narrow_linear(x, weight), linear(x, weight))


@pytest.mark.parametrize("name", ["classic", "rmoe", "deepseek_v3"])
def test_routers_choose_alike_with_and_without_gradient(name):
    torch.manual_seed(3)
    routers = build_routers(name, RouterSizes(width=WIDTH, num_experts=16, top_k=2, num_layers=2))
    for router in routers:
        router.init_parameters(0.05)
    x_LTD = torch.randn(2, ROWS, WIDTH)

    def run():
        carry, found = routers[0].begin(RoutingContext()), []
        for router, x_TD in zip(routers, x_LTD, strict=True):
            routing, carry, stats = router(x_TD, carry, RoutingContext())
            found.append((routing.expert_TK, routing.weight_TK, stats.logit_TR))
        return found

    with_gradient = run()
    with torch.no_grad():
        for found, expected in zip(run(), with_gradient, strict=True):
            torch.testing.assert_close(found[2], expected[2])
            same_T = (found[0] == expected[0]).all(dim=-1)
            assert same_T.float().mean() > 0.99
            torch.testing.assert_close(found[1][same_T], expected[1][same_T])
