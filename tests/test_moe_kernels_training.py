"""Forward and backward kernels against a loop in float64: on the GPU if there is one, else in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels import ExpertWeights, compute_experts
from moe.kernels.weights.activation import INNER, Activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
E = 5
GPT_OSS = Activation(alpha=1.702, limit=0.5, shift=1.0)


def reference(x_TD, expert_TK, combine_TK, weights, up, down, up_bias=None, down_bias=None):
    """The layer by definition, one routed row at a time; weights are of checkpoint order [E, O, D] and [E, D, F]."""
    rows = []
    for x_D, ids, factors in zip(x_TD, expert_TK.tolist(), combine_TK, strict=True):
        y_D = 0 * x_D
        for expert, factor in zip(ids, factors, strict=True):
            if not 0 <= expert < len(up):
                continue
            hidden = up[expert] @ x_D + (0 if up_bias is None else up_bias[expert])
            if not weights.activation.gated:
                gate, extra = hidden, None
            else:
                gate, extra = hidden.chunk(2) if weights.is_halves else (hidden[::2], hidden[1::2])
            y = down[expert] @ weights.activation.reference(gate, extra)
            y_D = y_D + factor * (y + (0 if down_bias is None else down_bias[expert]))
        rows.append(y_D)
    return torch.stack(rows)


def relative_error(found, truth):
    found, truth = found.double(), truth.double()
    return ((found - truth).norm() / truth.norm().clamp(min=1e-30)).item() if truth.norm() > 0 else found.norm().item()


def leaves(T, D, F, K, dtype, *, outputs=None, has_bias=False):
    outputs = 2 * F if outputs is None else outputs
    sizes = {"x": (T, D), "combine": (T, K), "up": (E, outputs, D), "down": (E, D, F)}
    if has_bias:
        sizes |= {"up_bias": (E, outputs), "down_bias": (E, D)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: torch.randn(size, dtype=wide if name == "combine" else dtype, device=DEVICE).mul(0.5).requires_grad_()
        for name, size in sizes.items()
    }


def check(expert_TK, tensors, tolerance, *, activation=None, is_halves=True, is_transposed=False):
    """Output and every gradient, and the gradient of each expert's weights on its own."""
    expert_TK = expert_TK.to(DEVICE)
    dtype = tensors["x"].dtype
    up, down = tensors["up"], tensors["down"]
    if is_transposed:
        # what a transposed checkpoint holds: contiguous [E, D, O], seen from the other side
        up, down = (
            tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in (up, down)
        )
        tensors = tensors | {"up": up, "down": down}
    weights = ExpertWeights(
        up,
        down,
        tensors.get("up_bias"),
        tensors.get("down_bias"),
        activation or Activation(),
        is_halves,
    )
    y_TD = compute_experts(tensors["x"], expert_TK, tensors["combine"], weights)
    cotangent = torch.randn_like(y_TD)
    gradients = torch.autograd.grad(y_TD, list(tensors.values()), cotangent)
    exact = {name: tensor.detach().double().cpu().requires_grad_() for name, tensor in tensors.items()}
    truth_TD = reference(
        exact["x"], expert_TK.cpu(), exact["combine"], weights, exact["up"], exact["down"],
        exact.get("up_bias"), exact.get("down_bias"),
    )  # fmt: skip
    truths = torch.autograd.grad(truth_TD, list(exact.values()), cotangent.double().cpu(), allow_unused=True)
    bound = tolerance[dtype]["rtol"]
    assert relative_error(y_TD.cpu(), truth_TD) < bound
    for name, gradient, truth in zip(tensors, gradients, truths, strict=True):
        truth = torch.zeros_like(exact[name]) if truth is None else truth
        assert gradient.shape == truth.shape
        assert gradient.stride() == tensors[name].stride(), name
        assert relative_error(gradient.cpu(), truth) < bound, name
        if name not in ("x", "combine"):
            for expert in range(E):
                assert relative_error(gradient[expert].cpu(), truth[expert]) < bound, f"{name} of expert {expert}"


ROUTINGS = {
    "odd": lambda: torch.randint(E, (37, 2)),
    "empty-slots-and-experts": lambda: torch.tensor([[0, E], [E, E], [3, 0], [E + 2, 3], [-1, 0]]),
    "all-on-one-expert": lambda: torch.full((35, 1), 2),
    "nobody": lambda: torch.full((3, 2), E),
    "one-token": lambda: torch.tensor([[4, 1, 0]]),
}


@pytest.mark.parametrize("case", list(ROUTINGS))
def test_output_and_every_gradient_for_every_routing(guarded_memory, tolerance, case):
    expert_TK = ROUTINGS[case]()
    T, K = expert_TK.shape
    check(expert_TK, leaves(T, 40, 24, K, torch.float32), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_number_format(tolerance, dtype):
    if dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("float64 products are proven in the interpreter")
    check(torch.randint(E + 1, (19, 2)), leaves(19, 24, 17, 2, dtype), tolerance)


LAYOUTS = {
    "interleaved-transposed-bias-gpt-oss": {
        "is_halves": False,
        "is_transposed": True,
        "has_bias": True,
        "activation": GPT_OSS,
    },
    "halves-transposed-bias": {"is_transposed": True, "has_bias": True},
    "interleaved": {"is_halves": False},
    "no-gate-relu2": {"activation": Activation("relu2", gated=False), "has_bias": True},
    "limited-without-shift": {"activation": Activation(limit=0.4)},
}


@pytest.mark.parametrize("case", list(LAYOUTS))
def test_every_layout(guarded_memory, tolerance, case):
    settings = dict(LAYOUTS[case])
    has_bias = settings.pop("has_bias", False)
    activation = settings.get("activation", Activation())
    tensors = leaves(9, 20, 18, 2, torch.float32, outputs=36 if activation.gated else 18, has_bias=has_bias)
    check(torch.randint(E + 1, (9, 2)), tensors, tolerance, **settings)


@pytest.mark.parametrize(("inner", "is_gated"), [*((inner, True) for inner in INNER), ("silu", False), ("gelu", False)])
def test_every_activation(tolerance, inner, is_gated):
    tensors = leaves(5, 16, 16, 1, torch.float32, outputs=32 if is_gated else 16)
    check(torch.tensor([[0], [1], [1], [4], [4]]), tensors, tolerance, activation=Activation(inner, is_gated))


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 products are proven in the interpreter")
@pytest.mark.parametrize(
    "activation", [Activation(), pytest.param(GPT_OSS, marks=pytest.mark.slow)], ids=["swiglu", "gpt-oss"]
)
def test_gradcheck_through_the_kernels_themselves(activation):
    tensors = leaves(3, 6, 4, 2, torch.float64, has_bias=True)
    expert_TK = torch.tensor([[0, 3], [3, E], [4, 0]])

    def run(x, combine, up, down, up_bias, down_bias):
        weights = ExpertWeights(up, down, up_bias, down_bias, activation, is_halves=False)
        return compute_experts(x, expert_TK, combine, weights)

    # fast mode compares random projections of the Jacobian; the full one costs a launch per input number
    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


def test_gradients_nobody_asked_for_are_not_computed():
    tensors = leaves(4, 16, 8, 1, torch.float32)
    frozen = ExpertWeights(tensors["up"].detach(), tensors["down"].detach())
    x_TD = tensors["x"]
    expert_TK = torch.tensor([[0], [1], [2], [3]], device=DEVICE)
    y_TD = compute_experts(x_TD, expert_TK, tensors["combine"].detach(), frozen)
    (grad_TD,) = torch.autograd.grad(y_TD.sum(), [x_TD])
    assert grad_TD.isfinite().all()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_backward_keeps_the_input_the_pre_activation_and_the_routing(dtype):
    T, D, F, K = 12, 64, 48, 4
    tensors = leaves(T, D, F, K, dtype)
    given = {tensor.data_ptr() for tensor in tensors.values()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_TK = torch.randint(E, (T, K), device=DEVICE)
        y_TD = compute_experts(
            tensors["x"], expert_TK, tensors["combine"], ExpertWeights(tensors["up"], tensors["down"])
        )
    y_TD.sum().backward()
    element = tensors["x"].element_size()
    pre_activation_bytes = T * K * 2 * F * element
    input_bytes = T * D * element
    kept_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    assert input_bytes + kept_bytes <= 1.05 * (input_bytes + pre_activation_bytes)
    assert all(tensor.numel() != T * K * D for tensor in kept.values())


def test_two_runs_agree_to_the_bit():
    tensors = leaves(33, 24, 16, 2, torch.float32)
    expert_TK = torch.randint(E, (33, 2), device=DEVICE)

    def run():
        y_TD = compute_experts(
            tensors["x"], expert_TK, tensors["combine"], ExpertWeights(tensors["up"], tensors["down"])
        )
        return y_TD, *torch.autograd.grad(y_TD.square().sum(), list(tensors.values()))

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))
