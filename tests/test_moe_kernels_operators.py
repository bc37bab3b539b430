"""The operators as PyTorch sees them: opcheck, torch.compile, autocast, and experts modules of transformers."""

import dataclasses
import importlib

import pytest
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

pytest.importorskip("triton")

from moe import Experts
from moe.kernels import ExpertWeights, can_compute, compute_experts, fused_experts, quantise
from moe.kernels.experts import activation_of
from moe.kernels.weights.activation import Activation
from moe.kernels.weights.flat import FlatWeights, flatten, unflatten
from moe.kernels.weights.quantise import FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu


def tensors(T=5, D=16, F=16, E=3, K=2):
    sizes = [(T, D), (T, K), (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D)]
    leaves = [torch.randn(size, device=DEVICE).mul(0.5).requires_grad_() for size in sizes]
    return leaves, torch.randint(E + 1, (T, K), device=DEVICE)


@pytest.mark.parametrize("saves", [True, False], ids=["training", "decode"])
def test_opcheck_of_the_experts_operator(saves):
    leaves, expert = tensors()
    x, combine, *projections = leaves if saves else [leaf.detach() for leaf in leaves]
    arguments = (x, combine, expert, saves, *flatten(ExpertWeights(*projections)))
    torch.library.opcheck(torch.ops.expertier.experts.default, arguments)


def test_opcheck_of_the_backward_operator():
    leaves, expert = tensors()
    x, combine, up, down, *_ = (leaf.detach() for leaf in leaves)
    flat = flatten(ExpertWeights(up, down))
    with torch.no_grad():
        y, *saved = torch.ops.expertier.experts(x, combine, expert, True, *flat)
    needs = [True, True, True, False, False, False]
    arguments = (torch.randn_like(y), x, combine, *saved, needs, *flat)
    torch.library.opcheck(torch.ops.expertier.experts_backward.default, arguments)


@pytest.mark.parametrize("saves", [True, False], ids=["training", "decode"])
def test_opcheck_with_quantised_weights(saves):
    (x, combine, up, down, _, _), expert = tensors(D=32, F=32)
    flat = flatten(ExpertWeights(*(quantise(weight.detach(), "int4", group=16) for weight in (up, down))))
    assert (flat.format, flat.groups) == ("int4", [1, 16, 1, 16])
    leaves = (x, combine) if saves else (x.detach(), combine.detach())
    torch.library.opcheck(torch.ops.expertier.experts.default, (*leaves, expert, saves, *flat))


def weights_of_every_kind():
    (_, _, up, down, up_bias, down_bias), _ = tensors(D=32, F=32)
    up, down, up_bias, down_bias = (leaf.detach() for leaf in (up, down, up_bias, down_bias))
    slot = torch.tensor([2, -1, 0, 1], dtype=torch.int32, device=DEVICE)
    gpt_oss = Activation("gelu", True, 1.702, 7.0, 1.0)
    yield "dense", ExpertWeights(up, down)
    yield "everything", ExpertWeights(up, down, up_bias, down_bias, gpt_oss, is_halves=False, slot_E=slot)
    yield "one bias", ExpertWeights(up, down, None, down_bias)
    yield "no gate", ExpertWeights(up[:, :32], down, activation=Activation("relu2", gated=False))
    for name in FORMATS:
        group = {"group": 16} if name == "int4" else {}
        both = (quantise(weight, name, **group) for weight in (up, down))
        yield name, ExpertWeights(*both, up_bias, down_bias, gpt_oss, slot_E=slot)


def fields_of(value):
    """All plain values and tensors of a dataclass, nested ones included."""
    if dataclasses.is_dataclass(value):
        return {f"{key}.{inner}": leaf for key in vars(value) for inner, leaf in fields_of(vars(value)[key]).items()}
    return {"": value}


@pytest.mark.parametrize(
    ("name", "weights"), list(weights_of_every_kind()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_flat_weights_are_the_same_weights_again(name, weights):
    found, wanted = fields_of(unflatten(flatten(weights))), fields_of(weights)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key] is value if isinstance(value, torch.Tensor) else found[key] == value, key


def test_flat_weights_put_their_tensors_aside_and_take_them_back():
    for _, weights in weights_of_every_kind():
        flat = flatten(weights)
        plain = flat.without_tensors()
        assert not any(isinstance(value, torch.Tensor) for value in plain)
        back = plain.with_tensors(flat.tensors())
        assert all(found is wanted for found, wanted in zip(back, flat, strict=True))


def test_casting_leaves_codes_scales_and_slots_alone():
    by_name = {name: flatten(weights, torch.float64) for name, weights in weights_of_every_kind()}
    dense, int4 = by_name["everything"], by_name["int4"]
    assert {leaf.dtype for leaf in (dense.up, dense.down, dense.up_bias, dense.down_bias)} == {torch.float64}
    assert dense.slot.dtype == torch.int32
    assert (int4.up.dtype, int4.up_scale.dtype, int4.up_bias.dtype) == (torch.uint8, torch.float32, torch.float64)


@pytest.mark.parametrize("name", ["experts", "experts_backward"])
def test_operators_end_with_the_fields_of_flat_weights(name):
    arguments = getattr(torch.ops.expertier, name).default._schema.arguments
    assert tuple(argument.name for argument in arguments[-len(FlatWeights._fields) :]) == FlatWeights._fields


def compiled_layer_equals_eager(backend):
    (x, combine, up, down, up_bias, down_bias), expert = tensors()
    leaves = (x, combine, up, down, up_bias, down_bias)

    def layer(x, combine, up, down, up_bias, down_bias, expert):
        weights = ExpertWeights(up * 2, down, up_bias, down_bias, Activation("gelu"))
        return compute_experts(x.sin(), expert, combine.softmax(-1), weights).cos()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found, truth = (call(*leaves, expert) for call in (compiled, layer))
    torch.testing.assert_close(found, truth)
    cotangent = torch.randn_like(truth)
    gradients = (torch.autograd.grad(y, leaves, cotangent) for y in (found, truth))
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves, expert), truth)


def test_exports_whole_and_computes_with_later_inputs():
    (x, combine, up, down, up_bias, down_bias), expert = tensors()

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([up, down, up_bias, down_bias])

        def forward(self, x, combine, expert):
            return compute_experts(x, expert, combine, ExpertWeights(*self.weights))

    layer, later = Layer(), (torch.randn_like(x), torch.rand_like(combine), expert.flip(0))
    with torch.no_grad():
        exported = torch.export.export(layer, (x, combine, expert)).module()
        torch.testing.assert_close(exported(*later), layer(*later))


def test_compiles_whole_with_gradients():
    compiled_layer_equals_eager("aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiles_whole_with_inductor():
    compiled_layer_equals_eager("inductor")


def test_autocast_decides_the_number_format():
    (x, combine, up, down, _, _), expert = tensors()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = compute_experts(x, expert, combine, ExpertWeights(up, down))
    exact = compute_experts(x, expert, combine, ExpertWeights(up, down))
    assert y.dtype == torch.float32
    relative = (y - exact).norm() / exact.norm()
    assert 1e-5 < relative < 2e-2


def test_no_tokens_give_no_rows():
    (x, combine, up, down, _, _), expert = tensors()
    assert compute_experts(x[:0], expert[:0], combine[:0], ExpertWeights(up, down)).shape == (0, 16)


def test_bad_input_is_refused_with_what_was_expected():
    (x, combine, up, down, _, _), expert = tensors()
    weights = ExpertWeights(up, down)
    with pytest.raises(ValueError, match=r"x must be \[T, 16\]; got \[5, 8\]"):
        compute_experts(x[:, :8], expert, combine, weights)
    with pytest.raises(ValueError, match=r"must both be \[T, K\] with T = 5"):
        compute_experts(x, expert[:3], combine, weights)
    with pytest.raises(ValueError, match="int32 or int64"):
        compute_experts(x, expert.float(), combine, weights)
    quantised = [quantise(weight.detach(), "int8") for weight in (up, down)]
    quantised[1].scale.requires_grad_()
    with pytest.raises(ValueError, match="quantised weights cannot be trained"):
        compute_experts(x, expert, combine, ExpertWeights(*quantised))


FAMILIES = {
    "mixtral": ("MixtralConfig", "MixtralExperts", {"num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", "GptOssExperts", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeExperts", {"num_experts": 4, "moe_intermediate_size": 24}),
    "nemotron_h": ("NemotronHConfig", "NemotronHExperts", {"n_routed_experts": 4, "moe_intermediate_size": 24}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterExperts", {"num_local_experts": 4}),
    "deepseek_v4": ("DeepseekV4Config", "DeepseekV4Experts", {"n_routed_experts": 4, "moe_intermediate_size": 24}),
}


def experts_of(family, implementation):
    config_name, module_name, sizes = FAMILIES[family]
    config_class = getattr(importlib.import_module(f"transformers.models.{family}.configuration_{family}"), config_name)
    config = config_class(hidden_size=32, intermediate_size=24, **sizes)
    config._experts_implementation = implementation
    module = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), module_name)(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module.to(DEVICE)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_experts_modules_of_transformers(family):
    module = experts_of(family, "eager")
    x = torch.randn(6, 32, device=DEVICE, requires_grad=True)
    expert = torch.stack([torch.randperm(4)[:2] for _ in range(6)]).to(DEVICE)
    combine = torch.rand(6, 2, device=DEVICE, requires_grad=True)
    assert can_compute(module, x)
    leaves = (x, combine, *module.parameters())
    found, truth = fused_experts(module, x, expert, combine), module(x, expert, combine)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    cotangent = torch.randn_like(truth)
    for gradient, exact in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (found, truth)), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)


def test_activations_are_recognised_by_what_they_compute():
    assert activation_of(experts_of("gpt_oss", "eager")) == Activation(alpha=1.702, limit=7.0, shift=1.0)
    assert activation_of(experts_of("nemotron_h", "eager")) == Activation("relu2", gated=False)
    assert activation_of(experts_of("mixtral", "eager")) == Activation()


def test_unknown_activations_and_norms_are_left_to_plain_torch(tiny_config):
    module = Experts(tiny_config())
    x = torch.zeros(1, 32)
    module.act_fn = nn.Mish()
    assert not can_compute(module, x)
    module.act_fn = nn.SiLU()
    assert can_compute(module, x)
    module.has_post_expert_norm = True
    assert not can_compute(module, x)


def test_a_model_of_transformers_trains_to_the_same_losses():
    from transformers import MixtralConfig, MixtralForCausalLM

    ALL_EXPERTS_FUNCTIONS.register("kernels_under_test", fused_experts)
    losses = {}
    for implementation in ("eager", "kernels_under_test"):
        torch.manual_seed(3)
        config = MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, experts_implementation=implementation,
        )  # fmt: skip
        model = MixtralForCausalLM(config).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        token_BS = torch.randint(32, (1, 7)).to(DEVICE)
        losses[implementation] = []
        for _ in range(3):
            loss = model(token_BS, labels=token_BS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[implementation].append(loss.item())
    assert losses["eager"][0] - losses["eager"][-1] > 0.1
    assert losses["kernels_under_test"] == pytest.approx(losses["eager"], rel=1e-5)


def test_an_experts_module_compiles_whole(tiny_config):
    module = Experts(tiny_config(hidden_size=16, moe_intermediate_size=16)).to(DEVICE)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    (x, combine, *_), expert = tensors(E=6)

    def layer(x, expert, combine):
        return fused_experts(module, x, expert, combine) if can_compute(module, x) else x

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, expert, combine), layer(x, expert, combine))
