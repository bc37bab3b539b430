"""Parts, experts and whole models under compilers, exporters and `torch.func`, against the same eager call."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import moe.parts.cpu_training
import moe.parts.linear
from moe import Experts, MoEForCausalLM
from moe.experts.grouped import grouped_experts
from moe.parts.attention import rotary_angles, rotate
from moe.parts.linear import Linear
from moe.parts.norm import RMSNorm

# torch's own, of vmap that it loops or copies, and of jvp that it is old
pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning",
    "ignore:torch.searchsorted:UserWarning",
    "ignore::DeprecationWarning",
)


@pytest.fixture(autouse=True)
def smallest_sizes(monkeypatch):
    """Every size is large enough for our own autograd functions, and oneDNN multiplies where there is one."""
    monkeypatch.setattr(moe.parts.cpu_training, "FEWEST_NUMBERS", 0)
    monkeypatch.setattr("moe.experts.grouped.BLOCKWISE_ROWS", 0)
    monkeypatch.setattr(
        moe.parts.linear,
        "library_of",
        lambda dtype: "onednn" if dtype == torch.float32 and torch.backends.mkldnn.is_available() else "torch",
    )


class Rotation(nn.Module):
    """Rotary angles as a module, with a weight so that there is a parameter to differentiate."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x):
        angles = rotary_angles(torch.arange(x.shape[-2])[None], 8, 100.0)
        return rotate((x * self.weight)[None, None], *angles)[0, 0]


class GroupedExperts(nn.Module):
    """A bank of experts by `grouped_experts`, with a routing of its own."""

    def __init__(self, config, num_tokens):
        super().__init__()
        self.experts = Experts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.register_buffer("expert_TK", torch.randint(config.num_experts + 1, (num_tokens, 2)))
        self.register_buffer("weight_TK", torch.rand(num_tokens, 2))

    def forward(self, x):
        return grouped_experts(self.experts, x, self.expert_TK, self.weight_TK)


@pytest.fixture(params=["norm", "linear", "rotation", "experts"])
def part(request, tiny_config):
    """A module and its input width; inputs have nine rows."""
    return {
        "norm": lambda: (RMSNorm(8, eps=1e-5), 8),
        "linear": lambda: (Linear(8, 6), 8),
        "rotation": lambda: (Rotation(), 8),
        "experts": lambda: (GroupedExperts(tiny_config(), 9), 32),
    }[request.param]()


def loss_of(module):
    return lambda parameters, x: functional_call(module, parameters, (x,)).square().sum()


def gradients(module, x):
    """Of every parameter, by the autograd functions that training uses."""
    parameters = dict(module.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss_of(module)(parameters, x), parameters.values()), strict=True))


def test_gradients_per_sample_are_those_of_single_calls(part):
    module, width = part
    x = torch.randn(3, 9, width)
    found = vmap(grad(loss_of(module)), in_dims=(None, 0))(dict(module.named_parameters()), x)
    for sample in range(3):
        wanted = gradients(module, x[sample])
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name][sample], gradient, rtol=1e-4, atol=1e-4)


def test_one_gradient_by_torch_func_is_that_of_autograd(part):
    module, width = part
    x = torch.randn(9, width)
    torch.testing.assert_close(
        grad(loss_of(module))(dict(module.named_parameters()), x), gradients(module, x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("maker", ["eager", "aot_eager", "export", "make_fx"])
def test_what_was_compiled_or_exported_computes_with_later_inputs(part, maker):
    module, width = part
    first, later = torch.randn(9, width), torch.randn(9, width)
    if maker == "export":
        made = torch.export.export(module, (first,)).module()
    elif maker == "make_fx":
        made = make_fx(module)(first)
    else:
        torch._dynamo.reset()
        made = torch.compile(module, fullgraph=True, backend=maker)
    torch.testing.assert_close(made(later), module(later), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", ["ids known", "ids batched"])
def test_experts_of_batched_calls_with_their_own_routings(tiny_config, group):
    module = GroupedExperts(tiny_config(), 9).experts
    x, weight_TK = torch.randn(3, 9, 32), torch.rand(3, 9, 2)
    expert_TK = torch.randint(7, (3, 9, 2) if group == "ids batched" else (9, 2))
    dims = (0, 0 if group == "ids batched" else None, 0)
    found = vmap(lambda *given: grouped_experts(module, *given), in_dims=dims)(x, expert_TK, weight_TK)
    for sample in range(3):
        expert = expert_TK[sample] if group == "ids batched" else expert_TK
        wanted = grouped_experts(module, x[sample], expert, weight_TK[sample])
        torch.testing.assert_close(found[sample], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["deepseek_v3", pytest.param("rmoe", marks=pytest.mark.slow)])
def test_a_whole_model_compiles_and_exports_to_the_same_logits(tiny_config, router):
    config = tiny_config(router=router, experts_implementation="expertier", num_hidden_layers=2)
    model = MoEForCausalLM(config).eval()
    token_BS = torch.randint(config.vocab_size, (2, 80))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, token_BS):
            return self.model(token_BS, use_cache=False).logits

    with torch.no_grad():
        wanted = Logits()(token_BS)
        torch._dynamo.reset()
        for made in (
            torch.compile(Logits(), backend="aot_eager"),
            torch.export.export(Logits(), (torch.zeros_like(token_BS),), strict=False).module(),
        ):
            torch.testing.assert_close(made(token_BS), wanted, rtol=1e-4, atol=1e-4)
