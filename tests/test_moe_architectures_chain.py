"""Chain-of-Experts: against plain loops in float64, the base layer, decoding, offloading, and the published traps."""

import pytest
import torch

import offload
from experiments.compare.measures.flops import measured_usage, token_flops
from moe import MoEForCausalLM, RoutedLayer
from routing import Carry, RoutingContext

CASES = {
    "stream": {"iterations": 2},
    "normed": {"iterations": 2, "residual": "normed"},
    "three": {"iterations": 3},
    "shared gate": {"iterations": 3, "residual": "normed", "shared_gate": True},
}
each_case = pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))


@pytest.fixture
def build(tiny_config):
    def make(options, **overrides):
        overrides = {"num_shared_experts": 1, "balance_loss_weight": 0.1, **overrides}
        return MoEForCausalLM(
            tiny_config(architecture="chain_of_experts", architecture_options=options, **overrides)
        ).eval()

    return make


def swiglu(x, gate, up, down):
    gated = gate @ x
    return down @ (gated * torch.sigmoid(gated) * (up @ x))


def chain_by_loops(layer, x_TD, options):
    """Token by token, expert by expert; raw softmax weights of the two best."""
    rows = []
    for x in x_TD:
        state, total = x, torch.zeros_like(x)
        for iteration in range(options["iterations"]):
            gate = layer.gates[0 if options.get("shared_gate") else iteration]
            scores = torch.softmax(gate.weight @ state, dim=0)
            best = sorted(range(len(scores)), key=lambda expert, s=scores: -s[expert])[:2]
            step = swiglu(
                state, layer.shared.gate_proj.weight, layer.shared.up_proj.weight, layer.shared.down_proj.weight
            )
            for expert in best:
                gate_proj, up_proj = layer.experts.gate_up_proj[expert].chunk(2)
                step = step + scores[expert] * swiglu(state, gate_proj, up_proj, layer.experts.down_proj[expert])
            state, total = state + step, total + step
        rows.append(state if options.get("residual") == "normed" else total)
    return torch.stack(rows)


@each_case
def test_forward_and_every_gradient_equal_plain_loops(build, tolerance, options):
    layer = build(options).double().model.layers[0].mlp
    x_TD = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    weight_TD = torch.randn(7, 32, dtype=torch.float64)
    parameters = [x_TD, *layer.parameters()]
    ours, _, _ = layer(x_TD, Carry(), RoutingContext())
    theirs = chain_by_loops(layer, x_TD, options)
    torch.testing.assert_close(ours, theirs, **tolerance[torch.float64])
    found = torch.autograd.grad((ours * weight_TD).sum(), parameters)
    expected = torch.autograd.grad((theirs * weight_TD).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def as_chain(state):
    return {name.replace(".mlp.router.", ".mlp.gates.0."): value for name, value in state.items()}


def test_one_iteration_on_the_stream_is_the_base_layer_bit_for_bit(tiny_config, build):
    base = MoEForCausalLM(tiny_config(num_shared_experts=1)).eval()
    chain = build({"iterations": 1})
    chain.load_state_dict(as_chain(base.state_dict()))
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(base(token_BS).logits, chain(token_BS).logits)


def test_one_normed_iteration_is_the_base_layer_on_a_stream_that_was_replaced_by_its_norm(tiny_config, build):
    """Trap (i): the published block returns norm(h) + MoE(norm(h)), its stream is gone."""
    base = MoEForCausalLM(tiny_config(num_shared_experts=1)).eval()
    chain = build({"iterations": 1, "residual": "normed"})
    chain.load_state_dict(as_chain(base.state_dict()))
    x_TD = torch.randn(5, 32)
    ours, _, _ = chain.model.layers[1].mlp(x_TD, Carry(), RoutingContext())
    added, _, _ = base.model.layers[1].mlp(x_TD, Carry(), RoutingContext())
    torch.testing.assert_close(ours, x_TD + added)
    assert not chain.model.layers[1].mlp.adds_to_stream
    with torch.no_grad():
        layer, seen = chain.model.layers[1], {}
        layer.post_attention_layernorm.register_forward_hook(lambda _m, _i, normed: seen.update(normed=normed))
        layer.register_forward_hook(lambda _m, _i, out: seen.update(out=out[0]))
        chain(torch.randint(96, (1, 4)))
        increment, _, _ = layer.mlp(seen["normed"].flatten(0, 1), Carry(), RoutingContext())
        assert torch.equal(seen["out"].flatten(0, 1), increment)


def test_a_shared_gate_reads_the_new_state_in_every_iteration(build):
    layer = build({"iterations": 2, "shared_gate": True}).model.layers[0].mlp
    _, _, stats = layer(torch.randn(64, 32), Carry(), RoutingContext())
    assert len(stats) == 1 == len(layer.routers)
    assert stats[0].num_tokens == 128
    assert not torch.equal(stats[0].probability_TR[:64], stats[0].probability_TR[64:])


@pytest.mark.parametrize("router", ["olmoe", "rmoe", "pregate", "loss_free"])
def test_offloaded_equals_resident_at_every_cache_size(build, tmp_path, router):
    options = {"state_width": 16} if router == "rmoe" else {}
    resident = build({"iterations": 2}, router=router, router_options=options)
    resident.save_pretrained(tmp_path)
    prompt = torch.randint(0, 96, (1, 6))
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    reference = offload.load(tmp_path, cache_experts=6).generate(prompt, **settings)
    assert torch.equal(reference.sequences, resident.generate(prompt, **settings).sequences)
    for slots in (1, 3, 5):
        ours = offload.load(tmp_path, cache_experts=slots).generate(prompt, **settings)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, reference.logits, strict=True))
    with torch.no_grad():
        logits = offload.load(tmp_path, cache_experts=2)(prompt).logits
        torch.testing.assert_close(logits, resident(prompt).logits)


def test_a_recorded_trace_has_the_experts_of_all_iterations(build, tmp_path):
    build({"iterations": 2}).save_pretrained(tmp_path)
    loaded = offload.load(tmp_path, cache_experts=6, record_trace=True)
    prompt = torch.randint(0, 96, (1, 5))
    stats = loaded(prompt).router_stats
    trace = loaded.offload.trace()
    assert trace.expert_TLK.shape == (5, 3, 4)
    both = torch.cat([stats[0].kept.expert_TK, stats[1].kept.expert_TK], dim=1)
    assert trace.expert_TLK[:, 0].tolist() == both.tolist()


def test_the_shared_expert_and_its_cost_count_in_every_iteration(build):
    """Trap (ii): D 32, F 24; 2 routed and 1 shared experts in each of 2 iterations are 6 evaluations, not 5."""
    model = build({"iterations": 2})
    output = model(torch.randint(96, (2, 8)))
    flops = token_flops(model, measured_usage([output], 16), sequence_length=8)
    expert = 6 * 32 * 24
    assert flops.experts == pytest.approx(3 * 2 * 2 * expert)
    assert flops.shared == 3 * 2 * expert
    assert flops.router == 3 * 2 * 2 * 6 * 32


def test_balance_counts_belong_to_the_gate_of_their_iteration(build):
    model = build({"iterations": 2}, router="loss_free").train()
    token_BS = torch.randint(96, (2, 16))
    counts = [call.count_R for call in model(token_BS, labels=token_BS).router_stats]
    model.model.post_step(counts, 32)
    for router, count_R in zip(model.model.routers, counts, strict=True):
        assert torch.equal(router.bias_R, 1e-3 * (count_R.double().mean() - count_R).sign().float())
    assert len(model.model.routers) == 6


def test_every_parameter_gets_a_gradient(build):
    model = build({"iterations": 2}).train()
    token_BS = torch.randint(96, (4, 30))
    model(token_BS, labels=token_BS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("options", "router", "message"),
    [
        ({"iterations": 0}, "olmoe", "iterations must be at least 1; got 0"),
        ({"residual": "outer"}, "olmoe", "residual must be one of stream, normed; got 'outer'"),
        ({"iteration": 2}, "olmoe", "did you mean 'iterations'"),
        ({}, "soft_moe", "cannot be in this chain"),
        ({"shared_gate": True}, "pregate", "cannot be in this chain"),
    ],
)
def test_chains_that_make_no_sense_are_refused(build, options, router, message):
    with pytest.raises(ValueError, match=message):
        build(options, router=router)


def test_a_chain_layer_keeps_the_contract(build):
    assert all(isinstance(layer, RoutedLayer) for layer in build({}).model.moe_layers)
