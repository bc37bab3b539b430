"""Code that computes past PyTorch's dispatcher, called by what passes stand-ins: compilers, exporters, vmap, fakes."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import routing.choice.gru
from routing import RouterSizes, RoutingContext, build_routers, gather_dot, gather_sum, has_plain_memory, top_experts
from routing.choice.plain_tensors import has_known_values, is_transformed
from routing.choice.scored_steps import scored_steps

# torch's own: of jit.trace that it is old and that sizes are constants, of vmap that it loops
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:There is a performance drop:UserWarning"
)
T, D, p, R = 192, 12, 8, 16


class Choice(nn.Module):
    """Both calls that hand addresses to C: the scored steps, and top-k of their scores."""

    def __init__(self):
        super().__init__()
        shapes = ((p, D), (3 * p, p), (3 * p, p), (3 * p,), (3 * p,), (R, p))
        self.given = nn.ParameterList(nn.Parameter(0.3 * torch.randn(shape)) for shape in shapes)

    def forward(self, x_TD, state_Tp):
        projection, *weights, score = self.given
        with torch.no_grad():
            score_TR, after_Tp = scored_steps(x_TD, state_Tp, projection, weights, score)
        return top_experts(score_TR, 3), score_TR, after_Tp


def compiled(module, backend):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend=backend)


def exported(module, given, strict):
    return torch.export.export(module, given, strict=strict).module()


MAKERS = {
    "compile, eager": lambda module, given: compiled(module, "eager"),
    "compile, aot_eager": lambda module, given: compiled(module, "aot_eager"),
    "export": lambda module, given: exported(module, given, True),
    "export, not strict": lambda module, given: exported(module, given, False),
    "make_fx": lambda module, given: make_fx(module)(*given),
    "jit.trace": lambda module, given: torch.jit.trace(module, given, check_trace=False),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_was_traced_computes_with_later_inputs(maker):
    """Addresses would be those of the traced call's inputs, or 0, and results would be constants."""
    module = Choice()
    traced = MAKERS[maker](module, (torch.randn(T, D), torch.randn(T, p)))
    later = torch.randn(T, D), torch.randn(T, p)
    wanted = module(*later)
    found = traced(*later)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1:], wanted[1:], rtol=1e-4, atol=1e-5)


def test_fake_tensors_have_shapes_and_are_not_written_to():
    module = Choice()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(torch.randn(T, width)) for width in (D, p)]
        shapes = [tuple(out.shape) for out in module(*given)]
    assert shapes == [(T, 3), (T, R), (T, p)]
    assert top_experts(given[0], 3).shape == (T, 3)  # the tensor remembers the mode that is over


def test_vmap_over_calls_is_one_call_after_the_other():
    module = Choice()
    x, state = torch.randn(3, T, D), torch.randn(3, T, p)
    found = torch.func.vmap(module)(x, state)
    for b in range(3):
        expert, *rest = module(x[b], state[b])
        assert torch.equal(found[0][b], expert)
        torch.testing.assert_close([out[b] for out in found[1:]], rest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dual", [0, 1], ids=["input", "state"])
def test_tangents_of_forward_mode_pass_the_scored_steps(dual):
    module, given = Choice(), [torch.randn(T, D), torch.randn(T, p)]
    with forward_ad.dual_level():
        given[dual] = forward_ad.make_dual(given[dual], torch.ones_like(given[dual]))
        _, score_TR, _ = module(*given)
        assert forward_ad.unpack_dual(score_TR).tangent.abs().max() > 0


def test_negated_views_are_read_with_their_sign():
    value = torch.complex(torch.zeros(T, R), torch.randn(T, R))
    score_TR = value.conj().imag
    assert score_TR.is_neg()
    assert torch.equal(top_experts(score_TR, 4), top_experts(-value.imag, 4))


def test_weights_of_another_dtype_or_width_are_refused_in_words_and_not_read():
    module = Choice()
    projection, *weights, score = module.given
    with torch.no_grad(), pytest.raises(ValueError, match=r"inputs must be \[T, 12\]; got \[192, 11\]"):
        scored_steps(torch.randn(T, D - 1), None, projection, weights, score)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        scored_steps(torch.randn(T, D), None, projection.double(), weights, score)


def test_what_has_plain_memory():
    plain = torch.randn(4, 4)
    assert has_plain_memory(plain, nn.Parameter(plain), plain.T, plain[1:])
    assert not has_plain_memory(plain, plain.to("meta"))
    assert not has_plain_memory(plain.to_sparse())
    assert not has_plain_memory(torch._efficientzerotensor((4, 4)))
    assert not has_plain_memory(torch._to_functional_tensor(plain))
    assert not has_plain_memory(plain.as_subclass(type("Other", (torch.Tensor,), {})))
    seen = []
    torch.func.vmap(lambda row: (seen.append((has_plain_memory(row), has_known_values(row))), row)[1])(plain)
    torch.func.grad(lambda x: (seen.append((has_plain_memory(x), has_known_values(x))), x.sum())[1])(plain)
    assert seen == [(False, False), (False, True)]
    assert has_known_values(plain)
    assert not is_transformed(plain)


def cell_of_torch(x, state, weights):
    return torch.gru_cell(x, torch.zeros_like(x) if state is None else state, *weights)


@pytest.mark.parametrize("has_state", [True, False])
def test_gradients_of_many_gru_cells_by_vmap(has_state, monkeypatch):
    monkeypatch.setattr(routing.choice.gru, "FEWEST_ROWS", 1)
    weights = [0.3 * torch.randn(shape) for shape in ((3 * p, p), (3 * p, p), (3 * p,), (3 * p,))]
    x, state = torch.randn(3, 20, p), torch.randn(3, 20, p) if has_state else None

    def gradient(cell):
        def loss(x_Tp, state_Tp):
            return cell(x_Tp, state_Tp, weights).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0 if has_state else None))(x, state)

    torch.testing.assert_close(gradient(routing.choice.gru.gru_cell), gradient(cell_of_torch))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("product", [gather_dot, gather_sum])
def test_products_with_table_rows_under_transforms(product, transform):
    table_ND, row_TK = torch.randn(9, 5), torch.randint(9, (7, 3))
    left = torch.randn(7, 5) if product is gather_dot else torch.randn(7, 3)
    plain = {
        gather_dot: lambda x: torch.einsum("tkd,td->tk", table_ND[row_TK], x),
        gather_sum: lambda w: torch.einsum("tkd,tk->td", table_ND[row_TK], w),
    }[product]

    def ours(value):
        return product(value, table_ND, row_TK)

    if transform == "vmap":
        values = torch.stack([left, 2 * left])
        found, wanted = torch.func.vmap(ours)(values), torch.stack([plain(value) for value in values])
    elif transform == "jvp":
        found, wanted = (torch.func.jvp(call, (left,), (left.cos(),)) for call in (ours, plain))
    else:
        found, wanted = (torch.func.grad(lambda v, call=call: call(v).square().sum())(left) for call in (ours, plain))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["mixtral", "rmoe", "deepseek_v3", "moepp", "xmoe"])
def test_a_router_exports_and_compiles_to_the_same_choice(name):
    """As a whole: x and the carry of an earlier layer in, ids and weights out."""
    sizes = RouterSizes(width=D, num_experts=16, top_k=4, num_layers=1)
    router = build_routers(name, sizes)[0].eval()
    router.init_parameters(0.5)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = router

        def forward(self, x_TD):
            context = RoutingContext()
            routed, _, _ = self.router(x_TD, self.router.begin(context), context)
            return routed.expert_TK, routed.weight_TK

    whole, later = Whole(), torch.randn(T, D)
    with torch.no_grad():
        wanted = whole(later)
        for maker in ("compile, aot_eager", "export, not strict"):
            expert, weight = MAKERS[maker](whole, (torch.randn(T, D),))(later)
            assert torch.equal(expert, wanted[0]), maker
            torch.testing.assert_close(weight, wanted[1], rtol=1e-4, atol=1e-5)
