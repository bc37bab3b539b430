"""Experts with frozen matrices by our C: outputs and gradients against float64, whatever the shapes and threads."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from offload.compute.adapters import LowRank
from offload.compute.orders import SUMMING_ROWS, orders
from offload.compute.routed_rows import ExpertSpans
from offload.finetune.passing import low_rank
from offload.finetune.passing.frozen import frozen_experts
from offload.finetune.passing.low_rank import MOST_RANK, summing_order
from offload.finetune.passing.rows import Call, RowGradients, Seen, expert_rows

D, F, E = 96, 64, 2
SUMMING = [order for order in orders() if order.name in SUMMING_ROWS] if summing_order() else []
pytestmark = pytest.mark.skipif(not SUMMING, reason="this processor has neither AMX nor AVX512_BF16")


def clamped(up):
    gate, linear = up[..., ::2].clamp(max=7.0), up[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(gate * 1.702) * (linear + 1)


GATES = {
    "halves": {"has_gate": True, "_apply_gate": lambda up: silu(up.chunk(2, dim=-1)[0]) * up.chunk(2, dim=-1)[1]},
    "interleaved": {"has_gate": True, "is_transposed": True, "has_bias": True, "_apply_gate": clamped},
    "activation": {"has_gate": False, "act_fn": lambda up: torch.relu(up).square()},
}


@pytest.mark.parametrize("order", SUMMING, ids=lambda order: order.name)
def test_sums_down_the_rows_of_matrices_of_any_shape(order):
    torch.manual_seed(0)
    for rows, (count, columns) in product((1, 5, 17, 40), ((64, 64), (33, 70), (1, 300), (1100, 40))):
        x, weight = torch.randn(rows, count).bfloat16(), torch.randn(count, columns).bfloat16()
        found = [torch.empty(rows, columns, dtype=torch.bfloat16) for _ in range(2)]
        for threads, out in enumerate(found, start=1):
            torch.set_num_threads(threads)
            order.multiply_turned(x, weight, out)
        torch.set_num_threads(1)
        alone = torch.empty(1, columns, dtype=torch.bfloat16)
        order.multiply_turned(x[-1:], weight, alone)
        assert torch.equal(*found)
        assert torch.equal(alone[0], found[0][-1])
        expected = x.double() @ weight.double()
        assert ((found[0].double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * count).all()


def test_orders_without_such_products_say_so():
    lanes, x = orders()[-1], torch.zeros(1, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="does not sum over rows"):
        lanes.multiply_turned(x, x.t().contiguous(), x[:, :1].contiguous())


def an_expert(kind):
    """A module, its layer's parameters and an expert: matrices as they lie, and adapters that require gradients."""
    flags = {"has_bias": False, "is_transposed": False} | GATES[kind]
    outputs = 2 * F if flags["has_gate"] else F
    shapes = {"gate_up_proj" if flags["has_gate"] else "up_proj": (outputs, D), "down_proj": (D, F)}
    biases = {f"{name}_bias": torch.randn(E, shape[0]).bfloat16() for name, shape in shapes.items()}
    module = SimpleNamespace(**flags, **biases)
    weights = {name: (torch.randn(shape) / shape[1] ** 0.5).bfloat16() for name, shape in shapes.items()}
    stored = {name: weight.t().contiguous() if module.is_transposed else weight for name, weight in weights.items()}
    factors = {
        name: LowRank((torch.randn(3, i) / i**0.5).requires_grad_(), (torch.randn(o, 3) / 2).requires_grad_(), 2.0)
        for name, (o, i) in shapes.items()
    }
    parameters = [SimpleNamespace(name=name, shape=w.shape, dtype=w.dtype) for name, w in stored.items()]
    return module, SimpleNamespace(parameters=parameters), Seen(stored, factors)


def wide(module, seen):
    """The same in float64."""
    copied = {
        name: value.double() if isinstance(value, torch.Tensor) else value for name, value in vars(module).items()
    }
    factors = {
        name: LowRank(*(part.detach().double().requires_grad_() for part in (low.a_rI, low.b_Or)), low.scale)
        for name, low in seen.adapters.items()
    }
    return SimpleNamespace(**copied), Seen({name: weight.double() for name, weight in seen.weights.items()}, factors)


def gradients_of(call, seen, through):
    rows = RowGradients(call, ExpertSpans(call.expert_TK, E))
    through(rows)
    found = [part.grad for low in seen.adapters.values() for part in (low.a_rI, low.b_Or)]
    for low in seen.adapters.values():
        low.a_rI.grad = low.b_Or.grad = None
    return [*found, *rows.inputs()]


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("rows", [1, 5, 17, 40])
@pytest.mark.parametrize("kind", GATES)
def test_outputs_and_gradients_are_as_near_to_float64_as_those_of_torch(kind, rows):
    torch.manual_seed(rows)
    module, layer, seen = an_expert(kind)
    kernel = frozen_experts(module, layer)
    assert kernel is not None
    assert kernel.takes(seen)
    x_TD, grad_TD = torch.randn(rows, D).bfloat16(), torch.randn(rows, D).bfloat16()
    call = Call(x_TD, torch.full((rows, 1), 1), torch.rand(rows, 1), grad_TD)
    wide_module, wide_seen = wide(module, seen)
    wide_call = Call(x_TD.double(), call.expert_TK, call.weight_TK.double(), grad_TD.double())
    with torch.no_grad():
        outputs = [kernel.outputs(1, seen, x_TD), expert_rows(module, 1, seen, x_TD)]
        expected = [expert_rows(wide_module, 1, wide_seen, x_TD.double())]
    found = gradients_of(call, seen, lambda of: of.pass_through_kernel(kernel, 1, seen))
    torchs = gradients_of(call, seen, lambda of: of.pass_through_frozen(module, 1, seen))
    expected += gradients_of(wide_call, wide_seen, lambda of: of.pass_through(expert_rows, wide_module, 1, wide_seen))
    for ours, theirs, exact in zip([outputs[0], *found], [outputs[1], *torchs], expected, strict=True):
        assert error(ours, exact) < max(1.5 * error(theirs, exact), 0.004)
    torch.set_num_threads(2)
    again = gradients_of(call, seen, lambda of: of.pass_through_kernel(kernel, 1, seen))
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_what_our_c_does_not_compute_is_left_to_torch(monkeypatch):
    module, layer, seen = an_expert("halves")
    kernel = frozen_experts(module, layer)
    many = LowRank(torch.zeros(MOST_RANK + 1, D), torch.zeros(2 * F, MOST_RANK + 1), 1.0)
    assert not kernel.takes(Seen(seen.weights, {"gate_up_proj": many}))
    odd = SimpleNamespace(parameters=[SimpleNamespace(**vars(layer.parameters[0]) | {"dtype": torch.float32})])
    assert frozen_experts(module, odd) is None
    assert frozen_experts(SimpleNamespace(**vars(module), has_post_expert_norm=True), layer) is None
    mixing = SimpleNamespace(**vars(module) | {"_apply_gate": lambda up: up[..., :F].softmax(-1)})
    assert frozen_experts(mixing, layer) is None
    monkeypatch.setattr(low_rank, "orders", lambda: orders()[-1:])
    assert frozen_experts(module, layer) is None
