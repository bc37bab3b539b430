"""Duo-LLM: modules, router and budget by hand, the dense model, decoding, and the oracle against brute force."""

from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import offload
from experiments.bench.duo.oracle import count_routes, every_route, oracle_routes, route_loss
from experiments.compare.measures.flops import measured_usage, token_flops
from moe import MoEForCausalLM
from routing import Carry, RoutingContext


@pytest.fixture
def build(tiny_config):
    def make(options=None, **overrides):
        sizes = {"intermediate_size": 48, "architecture": "duo_llm"} | overrides
        return MoEForCausalLM(tiny_config(**sizes, architecture_options={"small_width": 8, **(options or {})})).eval()

    return make


def swiglu(module, x):
    gate = module.gate_proj.weight @ x
    return module.down_proj.weight @ (gate * gate.sigmoid() * (module.up_proj.weight @ x))


# --- layers ---------------------------------------------------------------------------------------------------------


def test_forced_big_routes_are_the_dense_model(build, tiny_config):
    duo = build({"stage": "router", "skip": True})
    options = {"recursions": 1, "feed_forward": "dense"}
    dense = MoEForCausalLM(
        tiny_config(intermediate_size=48, architecture="mixture_of_recursions", architecture_options=options)
    ).eval()
    state = {name.replace(".mlp.big.", ".mlp."): value for name, value in duo.state_dict().items()}
    dense.load_state_dict({name: state[name] for name in dense.state_dict()})
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        with duo.model.stack.following(torch.zeros(18, 3, dtype=torch.long)):
            forced = duo(token_BS).logits
        torch.testing.assert_close(forced, dense(token_BS).logits)
        assert not torch.allclose(duo(token_BS).logits, forced)


def test_soft_mixing_equals_plain_loops_forward_and_every_gradient(build, tolerance):
    layer = build({"stage": "router", "skip": True, "temperature": 0.7}).double().model.layers[0].mlp
    x_TD = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    weight_TD = torch.randn(5, 32, dtype=torch.float64)
    ours, _, stats = layer(x_TD, Carry(), RoutingContext(is_training=True))
    shares = [((layer.router.weight @ x) / 0.7).softmax(dim=0) for x in x_TD]
    pairs = zip(shares, x_TD, strict=True)
    theirs = torch.stack([p[0] * swiglu(layer.big, x) + p[1] * swiglu(layer.small, x) for p, x in pairs])
    torch.testing.assert_close(ours, theirs, **tolerance[torch.float64])
    torch.testing.assert_close(stats[0].probability_TR, torch.stack(shares), **tolerance[torch.float64])
    parameters = [x_TD, *layer.parameters()]
    found = torch.autograd.grad((ours * weight_TD).sum(), parameters)
    expected = torch.autograd.grad((theirs * weight_TD).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_outside_training_the_likeliest_module_alone_computes(build, tolerance):
    layer = build({"stage": "router", "skip": True}).double().model.layers[0].mlp
    x_TD = torch.randn(30, 32, dtype=torch.float64)
    ours, _, stats = layer(x_TD, Carry(), RoutingContext())
    chosen = [int((layer.router.weight @ x).argmax()) for x in x_TD]
    assert set(chosen) == {0, 1, 2}
    assert stats[0].kept.expert_TK[:, 0].tolist() == chosen
    by_hand = [
        [swiglu(layer.big, x), swiglu(layer.small, x), torch.zeros_like(x)][module]
        for x, module in zip(x_TD, chosen, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(by_hand), **tolerance[torch.float64])


def test_modules_are_drawn_for_each_token_and_each_layer(build):
    """Trap: one draw per token, or one per layer, trains other routes than the oracle searches."""
    model = build({"skip": True}).train()
    drawn_LT = torch.stack([call.kept.expert_TK[:, 0] for call in model(torch.randint(96, (4, 50))).router_stats])
    for one in (drawn_LT[0], drawn_LT[:, 0:50].T.flatten()):
        assert set(one.tolist()) == {0, 1, 2}
    assert (drawn_LT[0] != drawn_LT[1]).any()
    shares = torch.stack([(drawn_LT == module).double().mean() for module in range(3)])
    assert (shares - 1 / 3).abs().max() < 0.1
    model.eval()
    assert all((call.kept.expert_TK == 0).all() for call in model(torch.randint(96, (2, 9))).router_stats)


def test_the_temperature_is_inside_the_exponential_and_hardens_as_it_falls(build):
    """Trap: printed outside of it, it cancels."""
    router = (
        build({"stage": "router", "temperature": 2.0, "final_temperature": 0.02, "temperature_steps": 10})
        .model.layers[0]
        .mlp.router
    )
    x_TD = torch.randn(6, 32)
    soft, half, hard = (
        router(x_TD, Carry(), RoutingContext(is_training=True, step=step))[2].probability_TR for step in (0, 5, 10)
    )
    torch.testing.assert_close(soft, ((x_TD @ router.weight.T) / 2.0).softmax(dim=-1))
    torch.testing.assert_close(half, ((x_TD @ router.weight.T) / 0.2).softmax(dim=-1))
    assert (hard.max(dim=-1).values > half.max(dim=-1).values).all()
    assert hard.max(dim=-1).values.min() > 0.95


def test_the_budget_is_one_for_all_layers_of_a_sequence(build, tolerance):
    model = build({"stage": "router", "budget": 0.25, "budget_weight": 3.0}).double().train()
    token_BS, mask = torch.randint(96, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    output = model(token_BS, labels=token_BS, attention_mask=mask)
    big_LT = torch.stack([call.probability_TR[:, 0] for call in output.router_stats])
    first, second = big_LT[:, :7].mean(), big_LT[:, 7:].mean()
    assert big_LT.shape == (3, 7 + 4)
    expected = 3.0 * ((first - 0.25) ** 2 + (second - 0.25) ** 2) / 2
    torch.testing.assert_close(output.losses["budget"], expected, **tolerance[torch.float64])
    torch.testing.assert_close(output.loss, output.lm_loss + expected, **tolerance[torch.float64])
    per_layer = 3.0 * ((big_LT[:, :7].mean(dim=1) - 0.25) ** 2).mean()
    assert not torch.isclose(output.losses["budget"], per_layer)


def test_a_checkpoint_starts_the_next_stage(build, tmp_path):
    model = build({"skip": True})
    model.save_pretrained(tmp_path)
    token_BS = torch.randint(96, (2, 9))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    config = build({"skip": True, "stage": "router"}).config
    routed = AutoModelForCausalLM.from_pretrained(tmp_path, config=config).eval()
    with torch.no_grad():
        assert torch.equal(model(token_BS).logits, loaded(token_BS).logits)
        assert not torch.equal(routed(token_BS).logits, loaded(token_BS).logits)
    assert torch.equal(routed.model.layers[1].mlp.big.up_proj.weight, model.model.layers[1].mlp.big.up_proj.weight)


def test_a_model_without_a_bank_of_experts_loads_as_a_dense_one(build, tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(offload.load(tmp_path)(token_BS).logits, model(token_BS).logits)


def test_operations_count_the_modules_that_were_taken(build):
    """D 32, widths 48 and 8, 3 layers: one token big, one small, two skip in each."""
    model = build({"skip": True})
    route_TL = torch.tensor([[0] * 3, [1] * 3, [2] * 3, [2] * 3])
    with model.model.stack.following(route_TL):
        output = model(torch.randint(96, (1, 4)))
    flops = token_flops(model, measured_usage([output], 4), sequence_length=4)
    assert flops.experts == pytest.approx(3 * (0.25 * 6 * 32 * 48 + 0.25 * 6 * 32 * 8))
    assert flops.router == 3 * 2 * 3 * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "second"}, "stage must be one of random, router; got 'second'"),
        ({"budget": 2}, r"must lie in 0\.\.1; got 2"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"small_width": 0}, "small_width must be at least 1"),
        ({"skips": True}, "did you mean 'skip'"),
    ],
)
def test_duos_that_make_no_sense_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(options)


def test_a_route_that_does_not_fit_is_refused(build):
    model = build()
    for route_TL in (torch.zeros(4, 2, dtype=torch.long), torch.full((4, 3), 2)):
        with (
            model.model.stack.following(route_TL),
            pytest.raises(ValueError, match=r"4 tokens by 3 layers of ids 0\.\.1"),
        ):
            model(torch.randint(96, (1, 4)))


# --- the oracle -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def oracle_by_brute_force(model, row, num_big, modules, history):
    """Every route of a token with whole forward passes and no cache, left to right."""
    layers, taken, losses = len(model.model.routers), [], []
    for position in range(len(row) - 1):
        best = None
        for route in product(range(modules), repeat=layers):
            if route.count(0) != num_big:
                continue
            route_TL = torch.tensor([*taken, list(route)])
            with model.model.stack.following(route_TL):
                logits = model(row[None, : position + 1]).logits[0, -1]
            loss = cross_entropy(logits[None], row[position + 1][None]).item()
            if best is None or loss < best[0]:
                best = (loss, list(route))
        losses.append(best)
        taken.append(best[1] if history == "oracle" else [0] * layers)
    return [route for _, route in losses], [loss for loss, _ in losses]


@pytest.mark.parametrize("history", ["oracle", "big"])
@pytest.mark.parametrize("skip", [False, True], ids=["two modules", "three modules"])
def test_the_exact_oracle_is_the_brute_force_one(build, history, skip):
    model = build({"skip": skip})
    token_BS = torch.randint(96, (2, 5))
    found = oracle_routes(model, token_BS, 1, history=history)
    assert found.is_exact
    for row in range(2):
        routes, losses = oracle_by_brute_force(model, token_BS[row], 1, 3 if skip else 2, history)
        assert found.route_BSL[row].tolist() == routes
        torch.testing.assert_close(found.loss_BS[row], torch.tensor(losses))


def test_oracle_losses_are_those_of_its_routes(build):
    model = build()
    token_BS = torch.randint(96, (3, 8))
    found = oracle_routes(model, token_BS, 2)
    last = torch.zeros(3, 1, 3, dtype=torch.long)
    assert found.loss_BS.mean().item() == pytest.approx(
        route_loss(model, token_BS, torch.cat([found.route_BSL, last], dim=1)), abs=1e-5
    )


def test_a_beam_is_exact_when_wide_and_no_better_when_narrow(build):
    model = build(num_hidden_layers=5)
    token_BS = torch.randint(96, (3, 6))
    exact = oracle_routes(model, token_BS, 3, history="big")
    wide = oracle_routes(model, token_BS, 3, history="big", beam=10)
    narrow = oracle_routes(model, token_BS, 3, history="big", beam=1)
    assert not wide.is_exact
    torch.testing.assert_close(wide.loss_BS, exact.loss_BS)
    assert torch.equal(wide.route_BSL, exact.route_BSL)
    assert (narrow.loss_BS >= exact.loss_BS - 1e-5).all()
    assert ((narrow.route_BSL == 0).sum(dim=-1) == 3).all()
    assert not oracle_routes(model, token_BS[:, :3], 3, most_routes=2).is_exact


def test_routes_are_counted_and_listed():
    assert count_routes(12, 4, 2) == 495
    assert count_routes(3, 1, 3) == len(list(every_route(3, 1, 3))) == 12
    assert sum(count_routes(4, big, 3) for big in range(5)) == 3**4


def test_searches_that_make_no_sense_are_refused(build, tiny_config):
    model, token_BS = build({"skip": True}), torch.randint(96, (1, 4))
    with pytest.raises(ValueError, match=r"num_big must lie in 0\.\.3"):
        oracle_routes(model, token_BS, 4)
    with pytest.raises(ValueError, match="knows no skipping"):
        oracle_routes(model, token_BS, 1, beam=2)
    with pytest.raises(ValueError, match="history must be oracle or big"):
        oracle_routes(model, token_BS, 1, history="small")
    with pytest.raises(ValueError, match="needs the architecture duo_llm"):
        oracle_routes(MoEForCausalLM(tiny_config()), token_BS, 1)
