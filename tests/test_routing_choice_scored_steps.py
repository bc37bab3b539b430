"""RMoE's step in C against torch's cell in float64: every width, few and many rows, with and without a state before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import routing.choice.library
import routing.choice.scored_steps
import routing.ground.c_library
from routing.choice.library import routing_kernels
from routing.choice.scored_steps import FEWEST_ROWS, scored_steps


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


def inputs(T, D, p, R, *, seed=0, dtype=torch.float32, size=0.3):
    """x, state, projection, the cell's four weights, scores."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, D), (T, p), (p, D), (3 * p, p), (3 * p, p), (3 * p,), (3 * p,), (R, p))
    x, *rest = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return x, *(size * value for value in rest)


def step(x, state, projection, *rest):
    *weights, score = rest
    return scored_steps(x, state, projection, weights, score)


def by_torch(x, state, projection, *rest):
    """The same in float64 by torch's own cell."""
    x, projection, *rest = (value.double() for value in (x, projection, *rest))
    *weights, score = rest
    before = x.new_zeros(len(x), len(projection)) if state is None else state.double()
    after = torch.gru_cell(x @ projection.T, before, *weights)
    return after @ score.T, after


def by_c(*given):
    """The C itself, whatever the number of rows."""
    x, state, projection, *rest = given
    return routing.choice.scored_steps._by_c(routing_kernels().expertier_scored_steps, x, state, (projection, *rest))


def assert_like_torch(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


needs_c = pytest.mark.skipif(routing_kernels() is None, reason="no C compiler, or no wide registers")


@needs_c
@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 130),
    D=st.integers(1, 300),
    p=st.integers(1, 150),
    R=st.integers(1, 80),
    has_state=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_width_is_torchs_cell(T, D, p, R, has_state, seed):
    with torch.no_grad():
        given = inputs(T, D, p, R, seed=seed)
        given = given if has_state else (given[0], None, *given[2:])
        assert_like_torch(by_c(*given), by_torch(*given))


@needs_c
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e20])
def test_gates_are_right_when_small_and_when_saturated(size):
    given = inputs(200, 40, 33, 7)
    given = (given[0] * size, *given[1:])
    assert_like_torch(by_c(*given), by_torch(*given))


@needs_c
def test_small_states_keep_their_digits():
    """A tangent by differences of exponentials would lose them."""
    x, _, projection, weight_x, weight_h, bias_x, bias_h, score = inputs(200, 40, 32, 8)
    given = (1e-6 * x, None, projection, weight_x, weight_h, 0 * bias_x, 0 * bias_h, score)
    for ours, theirs in zip(by_c(*given), by_torch(*given), strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@needs_c
def test_a_token_does_not_depend_on_the_others():
    given = inputs(300, 70, 24, 18)
    score, after = by_c(*given)
    order = torch.randperm(300)[:211]
    shuffled_score, shuffled_after = by_c(given[0][order], given[1][order], *given[2:])
    assert torch.equal(shuffled_score, score[order])
    assert torch.equal(shuffled_after, after[order])


@needs_c
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads, several_threads):
    given = inputs(1000, 70, 24, 18)
    alone = by_c(*given)
    several_threads(threads)
    for _ in range(20):
        assert all(torch.equal(found, wanted) for found, wanted in zip(by_c(*given), alone, strict=True))


@needs_c
def test_a_diverged_token_disturbs_no_other():
    given = inputs(300, 70, 24, 18)
    expected, _ = by_c(*given)
    given[0][17], given[0][18] = torch.nan, torch.inf
    found, _ = by_c(*given)
    others = [t for t in range(300) if t not in (17, 18)]
    assert torch.equal(found[others], expected[others])
    assert found[17].isnan().all()


@needs_c
def test_rows_and_weights_may_lie_anyhow_in_memory():
    given = inputs(200, 40, 24, 8)
    strided = [value.T.contiguous().T if value.ndim == 2 else value for value in given]
    for found, wanted in zip(step(*strided), step(*given), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("num_rows", [1, FEWEST_ROWS - 1, FEWEST_ROWS, 3 * FEWEST_ROWS + 1])
@pytest.mark.parametrize("compiler", ["as it is", "none"])
def test_few_and_many_rows_with_and_without_a_compiler(num_rows, has_state, compiler, monkeypatch):
    if compiler == "none":
        monkeypatch.setattr(routing.choice.scored_steps, "routing_kernels", lambda: None)
    given = inputs(num_rows, 40, 24, 8)
    given = given if has_state else (given[0], None, *given[2:])
    assert_like_torch(step(*given), by_torch(*given))


def test_double_precision_and_gradients_are_left_to_torch():
    given = inputs(200, 40, 24, 8, dtype=torch.float64)
    for found, wanted in zip(step(*given), by_torch(*given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    learning = [value.float().requires_grad_() for value in given]
    with torch.enable_grad():
        score, _ = step(*learning)
        gradients = torch.autograd.grad(score.square().sum(), learning)
    assert all(gradient.any() for gradient in gradients)


def learned(given, price, *, by):
    """Gradients of every input of a step."""
    with torch.enable_grad():
        leaves = [None if value is None else value.clone().requires_grad_() for value in given]
        score, after = by(*leaves)
        loss = (score * price[0]).sum() + (after * price[1]).sum()
        found = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))
        return [None if leaf is None else next(found) for leaf in leaves]


@needs_c
@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(FEWEST_ROWS, 300),
    D=st.integers(1, 150),
    p=st.integers(1, 70),
    R=st.integers(1, 40),
    has_state=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_gradient_is_torchs(T, D, p, R, has_state, seed):
    given = inputs(T, D, p, R, seed=seed)
    given = given if has_state else (given[0], None, *given[2:])
    price = [torch.randn(T, R), torch.randn(T, p)]

    def exact(x, state, projection, *rest):
        *weights, score = rest
        before = x.new_zeros(len(x), len(projection)) if state is None else state
        after = torch.gru_cell(x @ projection.T, before, *weights)
        return after @ score.T, after

    wanted = learned([None if v is None else v.double() for v in given], [v.double() for v in price], by=exact)
    for ours, theirs in zip(learned(given, price, by=step), wanted, strict=True):
        if theirs is not None:
            assert (ours.double() - theirs).norm() <= 2e-5 * theirs.norm() + 1e-5


@needs_c
def test_learning_has_the_bits_of_inference_and_asks_the_c_once(monkeypatch):
    given, calls = inputs(300, 40, 24, 8), []
    by_c_before = routing.choice.scored_steps._by_c
    monkeypatch.setattr(routing.choice.scored_steps, "_by_c", lambda *all_: calls.append(1) or by_c_before(*all_))
    expected = step(*given)
    with torch.enable_grad():
        found = step(*(value.clone().requires_grad_() for value in given))
    assert len(calls) == 2
    assert all(map(torch.equal, found, expected))
    assert all(tensor.grad_fn is not None for tensor in found)


@needs_c
def test_only_what_learns_gets_a_gradient_also_under_autocast():
    given = inputs(200, 40, 24, 8)
    x, *frozen = given
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        score, _ = step(x, *frozen)
        (gradient,) = torch.autograd.grad(score.sum(), [x])
        assert gradient.any()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow, _ = step(x, *frozen)
        assert torch.equal(narrow, score)
        assert torch.equal(torch.autograd.grad(narrow.sum(), [x])[0], gradient)


def test_the_state_of_other_tokens_is_refused():
    x, state, *rest = inputs(200, 40, 24, 8)
    with pytest.raises(ValueError, match=r"the state before must be torch.float32 \(200, 24\); got .* \(199, 24\)"):
        step(x, state[:199], *rest)
    with pytest.raises(ValueError, match="float64"):
        step(x, state.double(), *rest)


def test_a_machine_without_a_compiler_has_no_kernels(monkeypatch):
    monkeypatch.setattr(routing.ground.c_library.shutil, "which", lambda name: None)
    assert routing.choice.library.routing_kernels.__wrapped__() is None


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.c"
    source.write_text("this is no C")
    with pytest.raises(OSError, match="our C could not be compiled"):
        routing.ground.c_library.compile_library([source])
    assert not list((tmp_path / "expertier").iterdir())
