"""Experts in one call of C: the bits of the path for other experts, and left alone where it has no proof."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from offload.checkpoint.experts import ExpertLayer, Parameter
from offload.compute.fused_experts import FusedRows, fuse_experts
from offload.compute.gating import find_gating
from offload.compute.matvec import Matvecs
from offload.compute.orders import orders
from offload.compute.routed_rows import RoutedRows
from offload.formats.plain import PlainForm

TOP_K, NUM_EXPERTS = 3, 5


class Experts(nn.Module):
    """What the experts interface of transformers makes of an experts class, as far as it is looked at here."""

    is_transposed = has_bias = has_post_expert_norm = False
    is_concatenated = True
    _apply_gate = _default_apply_gate

    def __init__(self, activation="silu", has_gate=True):
        super().__init__()
        self.act_fn, self.has_gate = ACT2FN[activation], has_gate


def form_of(module, width, model_width, dtype=torch.bfloat16):
    up = ("gate_up_proj", (2 * width, model_width)) if module.has_gate else ("up_proj", (width, model_width))
    shapes = [up, ("down_proj", (model_width, width))]
    parameters = tuple(Parameter(n, n, s, dtype, (), None, ()) for n, s in shapes)
    return PlainForm(ExpertLayer("experts", NUM_EXPERTS, parameters))


def operands(form, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    weights = [{p.name: random(*p.shape) for p in form.layer.parameters} for _ in range(NUM_EXPERTS)]
    return weights, random(1, form.layer.parameters[0].shape[1]), random(1, TOP_K).abs()


def fuse(module, form, matvecs):
    return fuse_experts(module, form, TOP_K, matvecs)


def matrices(form, weights, experts):
    return [form.kernel_matrices(weights[expert], expert) for expert in experts]


@pytest.mark.parametrize("arithmetic", ["exact", "fixed", "fast"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_bits_of_the_path_for_many_tokens(arithmetic, activation, has_gate):
    module, matvecs = Experts(activation, has_gate), Matvecs(arithmetic)
    form = form_of(module, 128, 96)
    fused = fuse(module, form, matvecs)
    if fused is None:
        pytest.skip("no kernel here has torch's bits")
    for seed in range(20):
        weights, x_1D, weight_1K = operands(form, seed)
        expert_1K = torch.tensor([[4, 0, 2]]) if seed % 2 else torch.tensor([[1, NUM_EXPERTS, 3]])
        many = RoutedRows(module, NUM_EXPERTS, x_1D, expert_1K, weight_1K, matvecs)
        one = FusedRows(fused, NUM_EXPERTS, x_1D, expert_1K, weight_1K)
        assert one.num_rows == {expert: 1 for expert in expert_1K[0].tolist() if expert < NUM_EXPERTS}
        for expert in many.num_rows:
            many.start(expert, weights[expert])
        many.gate()
        for expert in many.num_rows:
            many.finish(expert, weights[expert])
        first, *others = one.num_rows
        one.start(first, form.kernel_matrices(weights[first], first))
        one.compute_several(others, matrices(form, weights, others))
        assert torch.equal(one.combine(), many.combine())


@pytest.mark.parametrize("order", orders(), ids=lambda order: order.name)
def test_kernels_against_float64(order):
    module, matvecs = Experts(), Matvecs("fast")
    matvecs._orders = (order,)
    form = form_of(module, 64 * TOP_K * torch.get_num_threads(), 160)
    weights, x_1D, weight_1K = operands(form, 0)
    rows = FusedRows(fuse(module, form, matvecs), NUM_EXPERTS, x_1D, torch.tensor([[3, 1, 0]]), weight_1K)
    rows.compute_several([0, 1, 3], matrices(form, weights, (0, 1, 3)))
    expected = torch.zeros(1, 160, dtype=torch.float64)
    for weight, expert in zip(weight_1K[0].double(), [3, 1, 0], strict=True):
        gate, up = (x_1D.double() @ weights[expert]["gate_up_proj"].double().t()).chunk(2, dim=-1)
        expected += weight * ((nn.functional.silu(gate) * up) @ weights[expert]["down_proj"].double().t())
    torch.testing.assert_close(rows.combine().double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_an_expert_that_is_left_out_contributes_nothing():
    module = Experts()
    form = form_of(module, 128, 96)
    fused = fuse(module, form, Matvecs("fast"))
    weights, x_1D, weight_1K = operands(form, 0)
    rows = FusedRows(fused, NUM_EXPERTS, x_1D, torch.tensor([[2, NUM_EXPERTS, -1]]), weight_1K)
    rows.compute(2, form.kernel_matrices(weights[2], 2))
    alone = FusedRows(fused, NUM_EXPERTS, x_1D, torch.tensor([[2]]), weight_1K[:, :1])
    alone.compute(2, form.kernel_matrices(weights[2], 2))
    assert torch.equal(rows.combine(), alone.combine())


@pytest.mark.parametrize("flag", ["is_transposed", "has_post_expert_norm"])
def test_layouts_that_are_not_covered(flag):
    module = Experts()
    form = form_of(module, 128, 96)
    setattr(module, flag, True)
    assert fuse(module, form, Matvecs("fast")) is None


def test_gates_activations_and_types_that_are_not_covered():
    matvecs = Matvecs("fast")
    wavy = type("Wavy", (Experts,), {"_apply_gate": lambda self, up: torch.sin(up).cumsum(-1).chunk(2, -1)[0]})()
    assert fuse(wavy, form_of(wavy, 128, 96), matvecs) is None
    mixing = Experts()
    mixing.act_fn = nn.Softmax(-1)
    assert fuse(mixing, form_of(mixing, 128, 96), matvecs) is None
    plain = Experts()
    assert fuse(plain, form_of(plain, 128, 96, torch.float32), matvecs) is None
    assert fuse(plain, form_of(plain, 72, 96), Matvecs("exact")) is None


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("width", [128, 96, 80])
def test_a_token_has_the_same_bits_whatever_tokens_are_beside_it(width, has_gate):
    module, matvecs = Experts(has_gate=has_gate), Matvecs("fixed")
    form = form_of(module, width, 96)
    fused = fuse(module, form, matvecs)
    if fused is None:
        assert width % 32
        return
    weights, _, _ = operands(form, 0)
    generator = torch.Generator().manual_seed(1)
    x_TD, weight_TK = torch.randn(37, 96, generator=generator).bfloat16(), torch.rand(37, TOP_K, generator=generator)
    expert_TK = torch.randint(0, NUM_EXPERTS + 1, (37, TOP_K), generator=generator)

    def run(tokens):
        rows = FusedRows(fused, NUM_EXPERTS, x_TD[tokens], expert_TK[tokens], weight_TK[tokens])
        experts = list(rows.num_rows)
        rows.compute_several(experts, matrices(form, weights, experts))
        return rows.combine()

    together = run(slice(0, 37))
    for tokens in (slice(0, 1), slice(3, 5), slice(8, 25), slice(36, 37)):
        assert torch.equal(run(tokens), together[tokens])


class OssExperts(Experts):
    """Gates of gpt-oss: interleaved, clamped, with biases."""

    has_bias, alpha, limit = True, 1.702, 7.0
    _apply_gate = GptOssExperts._apply_gate

    def __init__(self, width, model_width):
        super().__init__()
        self.gate_up_proj_bias = torch.randn(NUM_EXPERTS, 2 * width).bfloat16()
        self.down_proj_bias = torch.randn(NUM_EXPERTS, model_width).bfloat16()


@pytest.mark.parametrize("arithmetic", ["exact", "fixed"])
def test_biases_and_gates_of_pairs(arithmetic):
    torch.manual_seed(0)
    module, matvecs = OssExperts(128, 96), Matvecs(arithmetic)
    form = form_of(module, 128, 96)
    fused = fuse(module, form, matvecs)
    if fused is None:
        pytest.skip("no kernel here is bit-identical to torch")
    for seed in range(10):
        weights, x_1D, weight_1K = operands(form, seed)
        expert_1K = torch.tensor([[4, 0, 2]])
        many = RoutedRows(module, NUM_EXPERTS, x_1D, expert_1K, weight_1K, matvecs)
        for expert in many.num_rows:
            many.compute(expert, weights[expert])
        one = FusedRows(fused, NUM_EXPERTS, x_1D, expert_1K, weight_1K)
        one.compute_several([0, 2, 4], matrices(form, weights, (0, 2, 4)))
        assert torch.equal(one.combine(), many.combine())


@pytest.mark.parametrize("is_oss", [False, True])
def test_prompts_have_the_bits_of_the_path_for_many_tokens(is_oss):
    torch.manual_seed(0)
    module, matvecs = OssExperts(128, 96) if is_oss else Experts(), Matvecs("exact")
    form = form_of(module, 128, 96)
    fused = fuse(module, form, matvecs)
    if fused is None:
        pytest.skip("no kernel here is bit-identical to torch")
    weights, _, _ = operands(form, 0)
    x_TD, weight_TK = torch.randn(64, 96).bfloat16(), torch.rand(64, TOP_K).bfloat16()
    expert_TK = torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(64)])
    expert_TK[:61][expert_TK[:61] == 4] = NUM_EXPERTS  # one expert has a few rows, or none
    rows = FusedRows(fused, NUM_EXPERTS, x_TD, expert_TK, weight_TK)
    room = {name: torch.empty_like(weight) for name, weight in weights[0].items()}
    assert not fused.can_compute(rows.num_rows.values(), None)
    if not fused.can_compute(rows.num_rows.values(), room):
        pytest.skip("torch's order for several rows is not known here")
    experts = list(rows.num_rows)
    rows.compute_several(experts[1:], matrices(form, weights, experts[1:]))
    rows.compute(experts[0], form.kernel_matrices(weights[experts[0]], experts[0]))
    many = RoutedRows(module, NUM_EXPERTS, x_TD, expert_TK, weight_TK, matvecs)
    for expert in experts:
        many.compute(expert, weights[expert])
    assert torch.equal(rows.combine(), many.combine())


def test_tables_of_gates():
    usual, oss = find_gating(Experts(), 128), find_gating(OssExperts(128, 96), 128)
    assert (usual.linear, usual.is_interleaved, usual.is_gated) == (None, False, True)
    assert find_gating(Experts(), 64).gate is usual.gate  # one table for all layers
    assert oss.is_interleaved
    assert oss.linear is not None
    plain = find_gating(Experts("relu2", has_gate=False), 128)
    assert not plain.is_gated
    up = torch.randn(4, 256).mul_(20).bfloat16()
    for gating, module in ((usual, Experts()), (oss, OssExperts(128, 96))):
        assert torch.equal(gating(up), module._apply_gate(up))
