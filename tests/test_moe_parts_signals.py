"""Architectures whose routers read something else: chunks, conditions, a task bias, modalities, groups of features."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, silu

import offload
from experiments.evidence.resident import load_resident
from moe import MoEForCausalLM, fused_experts
from moe.experts.reference import swiglu_experts_reference
from moe.layers.stack import StackInputs
from moe.parts.attention import rotary_angles, rotate
from routing import BALANCE_LOSSES, Carry, RoutingContext, task_bias, z_loss

CASES = {
    "hydra previous chunk": {"architecture": "hydra", "architecture_options": {"chunk": 3}},
    "hydra with memory": {
        "architecture": "hydra",
        "architecture_options": {"chunk": 3, "memory": 25, "memory_top_k": 3, "memory_key_width": 8},
    },
    "hydra prefix": {"architecture": "hydra", "architecture_options": {"pooling": "prefix"}},
    "mode": {"architecture": "mode", "router": "qwen3_moe"},
    "mode of tokens": {"architecture": "mode", "architecture_options": {"reads": "token_and_condition"}},
    "glider": {"architecture": "glider", "router": "qwen3_moe"},
    "glider of adapters": {
        "architecture": "glider",
        "architecture_options": {"rank": 3},
        "router": "qwen3_moe",
        "num_shared_experts": 1,
    },
    "feature groups": {
        "architecture": "feature_groups",
        "architecture_options": {"shared_width": 8},
        "router": "mixtral",
    },
    "feature groups in attention": {
        "architecture": "feature_groups",
        "architecture_options": {"shared_width": 8, "attention": True},
        "router": "mixtral",
    },
    "mixture of transformers": {
        "architecture": "mixture_of_transformers",
        "architecture_options": {"first_ids": [0, 30, 60]},
        "num_experts": 3,
        "num_experts_per_tok": 1,
    },
}
WITHOUT_EXPERTS = ("feature groups", "feature groups in attention", "glider of adapters")
WITH_EXPERTS = [name for name in CASES if name not in WITHOUT_EXPERTS]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def model_of(tiny_config, case, **overrides):
    return MoEForCausalLM(tiny_config(**(case | overrides))).double().eval()


def inputs_for(case, B):
    """What a call of this case takes besides tokens."""
    return {"condition": torch.randn(B, 32).double()} if case["architecture"] == "mode" else {}


def test_left_padding_and_beams_change_nothing(case, tiny_config):
    model, prompt, extra = model_of(tiny_config, case), torch.randint(0, 96, (1, 7)), inputs_for(case, 1)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), prompt], dim=1)
    mask = (torch.arange(11) >= 4).long()[None]
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        plain = model.generate(prompt, max_new_tokens=5, **settings, **extra)
        again = model.generate(padded, attention_mask=mask, max_new_tokens=5, **settings, **extra)
        assert torch.equal(again[:, 4:], plain)


def test_trains_and_comes_back_bit_for_bit(case, tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config(**case, balance_loss_weight=0.1)).train()
    token_BS, extra = torch.randint(0, 96, (2, 16)), {k: v.float() for k, v in inputs_for(case, 2).items()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(6):
        output = model(token_BS, labels=token_BS, **extra)
        output.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        model.model.post_step([stats.count_R for stats in output.router_stats], 32)
        losses.append(output.lm_loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = load_resident(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(token_BS, **extra).logits, loaded(token_BS, **extra).logits)


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize("slots", [1, 2, 6])
def test_offloaded_equals_resident(name, slots, tiny_config, tmp_path):
    case = CASES[name]
    resident = MoEForCausalLM(tiny_config(**case)).eval()
    resident.save_pretrained(tmp_path)
    loaded, prompt = offload.load(tmp_path, cache_experts=slots), torch.randint(0, 96, (1, 6))
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    settings |= {k: v.float() for k, v in inputs_for(case, 1).items()}
    ours, theirs = loaded.generate(prompt, **settings), resident.generate(prompt, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b)


def compare_with_loops(layer, x_TD, context, plain, inputs, tolerance):
    ours, _, _ = layer(x_TD, Carry(), context)
    expected = plain(layer, x_TD)
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    seed = torch.randn_like(ours)
    ours_grads, plain_grads = (torch.autograd.grad((y * seed).sum(), inputs) for y in (ours, expected))
    for a, b in zip(ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def experts_of(layer, x_TD, score_TR, k, renormalise):
    share = score_TR.softmax(-1)
    expert_TK = share.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # before a first chunk all scores tie
    weight_TK = share.gather(-1, expert_TK)
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return swiglu_experts_reference(x_TD, expert_TK, weight_TK, layer.experts.gate_up_proj, layer.experts.down_proj)


def places(B, S, **fields):
    sequence, position = torch.arange(B).repeat_interleave(S), torch.arange(S).repeat(B)
    return RoutingContext(sequence_T=sequence, position_T=position, **fields)


@pytest.mark.parametrize("first", ["prefix", "zero"])
@pytest.mark.parametrize("pooling", ["previous_chunk", "prefix", "chunk", "sequence"])
def test_pooled_layer_equals_plain_loops(pooling, first, tiny_config, tolerance):
    options = {"pooling": pooling, "chunk": 3, "first_chunk": first}
    case = CASES["hydra previous chunk"] | {"architecture_options": options}
    layer = model_of(tiny_config, case).model.moe_layers[0]
    x_TD = torch.randn(16, 32).double().requires_grad_()

    def plain(layer, x_TD):
        rows = []
        for x_SD in x_TD.view(2, 8, 32):
            for s in range(8):
                start, end = {
                    "previous_chunk": (s // 3 * 3 - 3, s // 3 * 3),
                    "prefix": (0, s + 1),
                    "chunk": (s // 3 * 3, s // 3 * 3 + 3),
                    "sequence": (0, 8),
                }[pooling]
                if start < 0:
                    rows.append(x_SD[: s + 1].mean(0) if first == "prefix" else torch.zeros(32).double())
                else:
                    rows.append(x_SD[start:end].mean(0))
        return experts_of(layer, x_TD, torch.stack(rows) @ layer.router.weight.T, 2, renormalise=False)

    inputs = [x_TD, *layer.parameters()]
    compare_with_loops(layer, x_TD, places(2, 8), plain, inputs, tolerance)


@pytest.mark.parametrize("pooling", ["previous_chunk", "prefix", "chunk", "sequence"])
def test_trap_a_chunk_mean_looks_at_later_tokens(pooling, tiny_config):
    case = CASES["hydra previous chunk"] | {"architecture_options": {"pooling": pooling, "chunk": 4}}
    model, token_BS = model_of(tiny_config, case), torch.randint(0, 96, (1, 12))
    changed = token_BS.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 96
    with torch.no_grad():
        before, after = model(token_BS).logits, model(changed).logits
    is_causal = pooling in ("previous_chunk", "prefix")
    # the rounding of a product may change with the number of rows in it, which later tokens do change
    assert torch.allclose(before[:, :7], after[:, :7], rtol=0, atol=1e-10) == is_causal
    if not is_causal:
        with pytest.raises(ValueError, match="not causal"):
            model.generate(token_BS, max_new_tokens=1)


def test_tokens_of_a_chunk_share_their_experts(tiny_config):
    layer = model_of(tiny_config, CASES["hydra previous chunk"]).model.moe_layers[0]
    routing, _, _ = layer.router(torch.randn(12, 32).double(), Carry(), places(1, 12))
    for chunk in routing.expert_TK.split(3)[1:]:
        assert (chunk == chunk[0]).all()


def test_trap_the_first_chunk_visits_the_first_experts_whatever_it_says(tiny_config):
    """Scores of 0 tie, and a CPU takes the lowest numbers; the prefix mean lets a first chunk choose."""
    x_TD, seen = torch.randn(60, 32).double(), {}
    for first in ("zero", "prefix"):
        case = CASES["hydra previous chunk"] | {"architecture_options": {"chunk": 3, "first_chunk": first}}
        router = model_of(tiny_config, case).model.moe_layers[0].router
        routing, _, _ = router(x_TD, Carry(), places(20, 3))
        seen[first] = set(routing.expert_TK.flatten().tolist())
    assert seen["zero"] == {0, 1}
    assert len(seen["prefix"]) > 3


@pytest.mark.parametrize(("one_chunk", "pooled"), [("chunk", "sequence"), ("previous_chunk", "prefix")])
def test_one_chunk_is_the_pooled_sequence(one_chunk, pooled, tiny_config):
    token_BS, found = torch.randint(0, 96, (2, 9)), []
    for pooling in (one_chunk, pooled):
        case = CASES["hydra previous chunk"] | {"architecture_options": {"pooling": pooling, "chunk": 9}}
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(model_of(tiny_config, case)(token_BS).logits)
    torch.testing.assert_close(*found)


def test_memory_equals_a_softmax_over_the_best_of_all_places(tiny_config, tolerance):
    layer = model_of(tiny_config, CASES["hydra with memory"]).model.moe_layers[1]
    x_TD = torch.randn(6, 32).double().requires_grad_()

    def plain(layer, x_TD):
        keys, y_TD = layer.memory.keys, layer.layer(x_TD, Carry(), places(2, 3))[0]
        query = layer_norm((x_TD @ keys.query.T).view(6, 2, 8), (8,))
        for head in range(2):
            row, column = query[:, head, :4] @ keys.keys[0].T, query[:, head, 4:] @ keys.keys[1].T
            best = (row[:, :, None] + column[:, None, :]).flatten(1).topk(3)
            share = best.values.softmax(-1)
            y_TD = y_TD + (share[..., None] * layer.memory.values[best.indices]).sum(1)
        return y_TD

    compare_with_loops(layer, x_TD, places(2, 3), plain, [x_TD, *layer.parameters()], tolerance)


@pytest.mark.parametrize("reads", ["condition", "token_and_condition"])
def test_condition_layer_equals_plain_loops(reads, tiny_config, tolerance):
    case = CASES["mode"] | {"architecture_options": {"reads": reads}}
    layer = model_of(tiny_config, case).model.moe_layers[0]
    x_TD, condition_TD = (torch.randn(5, 32).double().requires_grad_() for _ in range(2))

    def plain(layer, x_TD):
        router = layer.router
        read = condition_TD if reads == "condition" else torch.cat([x_TD, condition_TD], -1)
        return experts_of(layer, x_TD, gelu(read @ router.inner.T) @ router.weight.T, 2, renormalise=True)

    inputs = [x_TD, condition_TD, *layer.parameters()]
    compare_with_loops(layer, x_TD, RoutingContext(condition_TD=condition_TD), plain, inputs, tolerance)


def test_mode_draws_experts_in_training_by_their_probability_without_replacement(tiny_config):
    router = model_of(tiny_config, CASES["mode"]).model.moe_layers[0].router
    condition = torch.randn(1, 32).double().expand(4000, -1)
    context = RoutingContext(condition_TD=condition, is_training=True)
    routing, _, stats = router(torch.zeros(4000, 32).double(), Carry(), context)
    assert (routing.expert_TK[:, 0] != routing.expert_TK[:, 1]).all()
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(4000).double())
    share = (gelu(condition[:1] @ router.inner.T) @ router.weight.T).softmax(-1)[0]
    first = torch.bincount(routing.expert_TK[:, 0], minlength=6) / 4000
    torch.testing.assert_close(first.double(), share.detach(), atol=0.03, rtol=0)
    # balance: E sum over experts of load share and mean weight of the selected, renormalised
    weight = torch.zeros(4000, 6).double().scatter(1, routing.expert_TK, routing.weight_TK).mean(0)
    expected = 6 * (stats.count_R / stats.count_R.sum() * weight).sum()
    torch.testing.assert_close(BALANCE_LOSSES["switch"](stats), expected)


def test_trap_z_loss_sees_logits_before_any_maximum_is_subtracted(tiny_config):
    """After subtracting the maximum the log-partition lies within [0, log E], and drift of the logits goes unseen."""
    router = model_of(tiny_config, CASES["mode"]).model.moe_layers[0].router
    with torch.no_grad():
        router.weight += 10
    _, _, stats = router(torch.zeros(8, 32).double(), Carry(), RoutingContext(condition_TD=torch.randn(8, 32).double()))
    assert z_loss(stats) > torch.tensor(6.0).log() ** 2


def test_trap_experts_are_added_to_the_stream_not_to_its_norm(tiny_config):
    model = model_of(tiny_config, CASES["mode"])
    layer = model.model.layers[0]
    assert layer.mlp.adds_to_stream
    with torch.no_grad():
        layer.mlp.experts.down_proj.zero_()
        layer.self_attn.o_proj.weight.zero_()
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output[0])))
    model(torch.randint(0, 96, (1, 5)))
    handle.remove()
    assert torch.equal(*seen[0])


def test_fused_experts_compute_what_routed_ones_do(tiny_config, tolerance):
    model, token_BS = model_of(tiny_config, CASES["mode"], num_shared_experts=1), torch.randint(0, 96, (3, 9))
    condition = torch.randn(2, 32).double()[[0, 1, 0]]
    with torch.no_grad():
        routed = model(token_BS, condition=condition).logits
        with fused_experts(model) as cache:
            fused = model(token_BS, condition=condition).logits
            assert (cache.misses, cache.hits) == (6, 3), "two conditions in three layers, one of them twice"
            model(token_BS, condition=condition)
            assert cache.misses == 6
    torch.testing.assert_close(fused, routed, **tolerance[torch.float64])
    settings = {"max_new_tokens": 4, "do_sample": False, "condition": condition}
    with fused_experts(model):
        fused_tokens = model.generate(token_BS, **settings)
    assert torch.equal(fused_tokens, model.generate(token_BS, **settings))


def test_trap_conditions_of_equal_mean_are_different_conditions(tiny_config, tolerance):
    model, token_BS = model_of(tiny_config, CASES["mode"]), torch.randint(0, 96, (1, 6))
    first = torch.randn(1, 32).double()
    second = first.flip(-1)
    with torch.no_grad(), fused_experts(model) as cache:
        model(token_BS, condition=first)
        fused = model(token_BS, condition=second).logits
        assert cache.misses == 6
    torch.testing.assert_close(fused, model(token_BS, condition=second).logits, **tolerance[torch.float64])


def test_trap_the_cache_is_valid_only_if_the_router_reads_the_condition_alone(tiny_config):
    for name in ("mode of tokens", "glider"):
        model = model_of(tiny_config, CASES[name])
        with pytest.raises(ValueError, match="read the condition and nothing else"), fused_experts(model):
            pass
    model = model_of(tiny_config, CASES["mode"])
    with pytest.raises(ValueError, match="eval"), fused_experts(model.train()):
        pass


def test_fused_experts_follow_changed_weights(tiny_config, tolerance):
    model, token_BS = model_of(tiny_config, CASES["mode"]), torch.randint(0, 96, (1, 6))
    with torch.no_grad(), fused_experts(model) as cache:
        model(token_BS)
        for layer in model.model.moe_layers:
            layer.experts.down_proj.mul_(2)
        fused = model(token_BS).logits
        assert cache.misses == 6
    torch.testing.assert_close(fused, model(token_BS).logits, **tolerance[torch.float64])


def test_glider_layer_equals_plain_loops(tiny_config, tolerance):
    layer = model_of(tiny_config, CASES["glider"]).model.moe_layers[1]
    x_TD, bias_LR = torch.randn(5, 32).double().requires_grad_(), torch.randn(3, 6).double()

    def plain(layer, x_TD):
        score = layer_norm(x_TD, (32,)) @ layer.router.weight.T / 32**0.5 + bias_LR[1]
        return experts_of(layer, x_TD, score, 2, renormalise=True)

    inputs = [x_TD, *layer.parameters()]
    compare_with_loops(layer, x_TD, RoutingContext(logit_bias_LR=bias_LR), plain, inputs, tolerance)


def test_adapters_equal_loops_and_an_untrained_one_adds_nothing(tiny_config, tolerance):
    layer = model_of(tiny_config, CASES["glider of adapters"]).model.moe_layers[1]
    x_TD, experts = torch.randn(5, 32).double().requires_grad_(), layer.experts
    with torch.no_grad():
        torch.testing.assert_close(layer(x_TD, Carry(), RoutingContext())[0], layer.shared(x_TD))
        experts.down_proj.normal_()

    def plain(layer, x_TD):
        share = (layer_norm(x_TD, (32,)) @ layer.router.weight.T / 32**0.5).softmax(-1)
        weight_TK, expert_TK = share.topk(2)
        weight_TK, rows = weight_TK / weight_TK.sum(-1, keepdim=True), []
        for x, weight, expert in zip(x_TD, weight_TK, expert_TK, strict=True):
            pairs = zip(weight, expert.tolist(), strict=True)
            rows.append(sum(w * experts.down_proj[e] @ (experts.up_proj[e] @ x) / 3 for w, e in pairs))
        return torch.stack(rows) + layer.shared(x_TD)

    compare_with_loops(layer, x_TD, RoutingContext(), plain, [x_TD, *layer.parameters()], tolerance)
    with pytest.raises(ValueError, match="num_shared_experts must be at least 1"):
        model_of(tiny_config, CASES["glider of adapters"], num_shared_experts=0)


def test_a_gate_is_tuned_on_its_own_expert_alone(tiny_config, tolerance):
    layer = model_of(tiny_config, CASES["glider"]).model.moe_layers[0]
    layer.router.tuned_expert = 4
    x_TD = torch.randn(5, 32).double().requires_grad_()

    def plain(layer, x_TD):
        weight_T1 = 1 / (1 + torch.exp(-x_TD @ layer.router.weight[4]))[:, None]
        expert_T1, bank = torch.full((5, 1), 4), layer.experts
        return swiglu_experts_reference(x_TD, expert_T1, weight_T1, bank.gate_up_proj, bank.down_proj)

    compare_with_loops(layer, x_TD, RoutingContext(), plain, [x_TD, *layer.parameters()], tolerance)
    gradient = torch.autograd.grad(layer(x_TD, Carry(), RoutingContext())[0].sum(), layer.router.weight)[0]
    assert gradient[4].abs().sum() > 0
    assert gradient[[0, 1, 2, 3, 5]].abs().sum() == 0


def test_task_bias_is_the_scaled_cosine_and_steers_a_request(tiny_config):
    expert_LEA, task_A = torch.randn(3, 6, 10), torch.randn(10)
    bias = task_bias(task_A, expert_LEA, scale=3.0)
    expected = [[3 * torch.cosine_similarity(task_A, e, dim=0) for e in layer] for layer in expert_LEA]
    torch.testing.assert_close(bias, torch.tensor(expected))
    model, token_BS = model_of(tiny_config, CASES["glider"]), torch.randint(0, 96, (2, 6))
    with torch.no_grad():
        steered = model(token_BS, logit_bias_LR=task_bias(task_A, expert_LEA, scale=1e6).double())
        plain = model(token_BS)
        unsteered = model(token_BS, logit_bias_LR=task_bias(task_A, expert_LEA, scale=0.0).double())
    for layer, stats in enumerate(steered.router_stats):
        assert set(stats.chosen.expert_TK.flatten().tolist()) == set(bias[layer].topk(2).indices.tolist())
    assert torch.equal(unsteered.logits, plain.logits)
    made = model.generate(token_BS, max_new_tokens=2, logit_bias_LR=task_bias(task_A, expert_LEA, 1e6).double())
    assert made.shape == (2, 8)


def test_feature_groups_equal_plain_loops(tiny_config, tolerance):
    layer = model_of(tiny_config, CASES["feature groups"]).model.moe_layers[0]
    with torch.no_grad():
        layer.fusion.weight += torch.randn_like(layer.fusion.weight)
    x_TD = torch.randn(5, 32).double().requires_grad_()

    def plain(layer, x_TD):
        rows = []
        for x in x_TD:
            score, group = (layer.router.weight @ x).topk(2)
            weight = score.softmax(0)
            pieces, mask = [x[:8]], [torch.ones(8).double()]
            for g in range(6):
                here = (group == g).nonzero().flatten()
                factor = 2 * weight[here[0]] if len(here) else torch.zeros(()).double()
                pieces.append(x[8 + 4 * g : 12 + 4 * g] * factor)
                mask.append(torch.full((4,), float(len(here) > 0)).double())
            y = layer.feed_forward(torch.cat(pieces) * 32 / 16) * torch.cat(mask)
            grouped = y[8:].view(6, 4)
            fused = [[layer.fusion.weight[w, f] @ grouped[:, w] for w in range(4)] for f in range(6)]
            rows.append(torch.cat([y[:8], torch.stack([torch.stack(row) for row in fused]).flatten()]))
        return torch.stack(rows)

    inputs = [x_TD, *layer.parameters()]
    compare_with_loops(layer, x_TD, RoutingContext(), plain, inputs, tolerance)


def test_feature_groups_fusion_starts_as_the_identity(tiny_config):
    layer = MoEForCausalLM(tiny_config(**CASES["feature groups"])).model.moe_layers[0]
    assert torch.equal(layer.fusion.weight, torch.eye(6).expand(4, 6, 6))


@pytest.mark.parametrize("name", ["feature groups", "feature groups in attention"])
def test_feature_groups_that_are_all_kept_are_the_dense_model(name, tiny_config, tolerance):
    """Weights 1 / K of a hash router times K are 1, and all over active features is 1."""
    case = CASES[name] | {"router": "hash", "num_experts_per_tok": 6}
    model, token_BS = model_of(tiny_config, case), torch.randint(0, 96, (2, 7))
    recursion = {"choice": "none", "recursions": 1, "feed_forward": "dense", "first": 1, "last": 1}
    dense = model_of(
        tiny_config,
        {"architecture": "mixture_of_recursions", "architecture_options": recursion, "num_hidden_layers": 3},
    )
    renamed = {key.replace("mlp.feed_forward", "mlp"): value for key, value in model.state_dict().items()}
    dense.load_state_dict({key: renamed[key] for key in dense.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(model(token_BS).logits, dense(token_BS).logits, **tolerance[torch.float64])


@pytest.mark.parametrize("attention", [False, True])
def test_feature_groups_multiply_what_they_say(attention, tiny_config):
    """Counted by torch, without the attention scores; the fusion and the router are matrices too."""
    from torch.utils.flop_counter import FlopCounterMode

    from experiments.compare.measures.flops import measured_usage, token_flops

    case = CASES["feature groups in attention" if attention else "feature groups"]
    model, token_BS = model_of(tiny_config, case), torch.randint(0, 96, (2, 8))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(token_BS, use_cache=False)
    counted = sum(
        flops
        for operator, flops in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operator) and "scaled_dot" not in str(operator)
    )
    said = token_flops(model, measured_usage([output], 16), sequence_length=8)
    scores = 3 * 2 * 2 * 32 * 4.5  # layers, two products, query width, visible positions
    assert counted / 16 == pytest.approx(said.total - scores, rel=1e-6)


def test_modality_layer_equals_loops_over_tokens_with_every_gradient(tiny_config, tolerance):
    layer = model_of(tiny_config, CASES["mixture of transformers"]).model.layers[1]
    token_S = torch.tensor([1, 40, 2, 70, 41])
    kind = [0, 1, 0, 2, 1]
    x_BSD = torch.randn(1, 5, 32).double().requires_grad_()
    angles = rotary_angles(torch.arange(5)[None], 8, 10_000.0)
    context = RoutingContext(token_id_T=token_S, position_T=torch.arange(5), sequence_T=torch.zeros(5).long())
    ours = layer(x_BSD, Carry(), StackInputs(angles=angles, mask=None, cache=None, context=context))[0][0]
    attention, rows = layer.self_attn, []
    normed = [layer.input_layernorm.of[m](x) for m, x in zip(kind, x_BSD[0], strict=True)]

    def head(name, s, h, norm=None):
        made = getattr(attention, name).of[kind[s]](normed[s])[8 * h : 8 * h + 8]
        if norm is None:
            return made
        made = getattr(attention, norm).of[kind[s]](made)
        return rotate(made[None, None, None], angles[0][:, :, s : s + 1], angles[1][:, :, s : s + 1])[0, 0, 0]

    for s in range(5):
        read = []
        for h in range(4):
            query = head("q_proj", s, h, "q_norm")
            score = torch.stack([query @ head("k_proj", t, h // 2, "k_norm") / 8**0.5 for t in range(s + 1)])
            read.append(sum(w * head("v_proj", t, h // 2) for t, w in enumerate(score.softmax(0))))
        y = x_BSD[0, s] + attention.o_proj.of[kind[s]](torch.cat(read))
        hidden, bank = layer.post_attention_layernorm.of[kind[s]](y), layer.mlp.experts
        gate, up = (bank.gate_up_proj[kind[s]] @ hidden).chunk(2)
        rows.append(y + bank.down_proj[kind[s]] @ (silu(gate) * up))
    expected = torch.stack(rows)
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    inputs, seed = [x_BSD, *layer.parameters()], torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), inputs) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_modalities_have_their_own_weights_and_one_attention(tiny_config):
    """Other modalities' weights get a gradient only through the tokens of theirs that attention reads."""
    model = model_of(tiny_config, CASES["mixture of transformers"])
    token_BS = torch.tensor([[1, 2, 40, 3, 70, 5]])  # modalities 0 0 1 0 2 0
    logits = model(token_BS).logits
    logits[0, 1].sum().backward()
    for name, parameter in model.named_parameters():
        if ".of.1." in name or ".of.2." in name:
            assert parameter.grad is None or not parameter.grad.any(), name
    model.zero_grad()
    model(token_BS).logits[0, 3].sum().backward()
    grads = dict(model.named_parameters())
    assert grads["model.layers.0.self_attn.k_proj.of.1.weight"].grad.any(), "attention reads the other modality"
    assert not grads["model.layers.0.self_attn.k_proj.of.2.weight"].grad.any(), "which comes later"
    assert grads["model.layers.0.mlp.experts.down_proj"].grad[2].abs().max() == 0


def test_a_mixture_of_transformers_with_equal_weights_is_the_dense_model(tiny_config, tolerance):
    case = CASES["mixture of transformers"]
    model = model_of(tiny_config, case)
    dense = MoEForCausalLM(tiny_config(num_dense_layers=2, intermediate_size=24, num_experts=3)).double().eval()
    state, ours = dense.state_dict(), model.state_dict()
    for name in ours:
        plain = name.replace(".of.0", "").replace(".of.1", "").replace(".of.2", "")
        if plain in state:
            ours[name] = state[plain]
        elif name.endswith("gate_up_proj"):
            base = name.replace("experts.gate_up_proj", "")
            if f"{base}gate_proj.weight" in state:
                both = torch.cat([state[f"{base}gate_proj.weight"], state[f"{base}up_proj.weight"]])
                ours[name] = both.expand(3, -1, -1).clone()
        elif name.endswith("experts.down_proj"):
            base = name.replace("experts.down_proj", "down_proj.weight")
            if base in state:
                ours[name] = state[base].expand(3, -1, -1).clone()
    model.load_state_dict(ours)
    token_BS = torch.randint(0, 96, (2, 9))
    seen = []
    for network in (model, dense):
        handle = network.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        network(token_BS)
        handle.remove()
    torch.testing.assert_close(*seen, **tolerance[torch.float64])


def test_given_modalities_replace_those_of_the_ids(tiny_config):
    model, token_BS = model_of(tiny_config, CASES["mixture of transformers"]), torch.randint(0, 30, (2, 5))
    stats = model(token_BS, modality=torch.tensor([[2], [1]])).router_stats[0]
    assert stats.chosen.expert_TK.view(2, 5).tolist() == [[2] * 5, [1] * 5]
    made = model.generate(token_BS, max_new_tokens=3, modality=torch.tensor([[2], [1]]), do_sample=False)
    assert made.shape == (2, 8)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        model(token_BS, modality=torch.full((2, 5), 3))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("hydra prefix", {"architecture_options": {"pooling": "mean"}}, "pooling"),
        ("hydra prefix", {"architecture_options": {"chunk": 0}}, "chunk must be at least 1"),
        ("hydra prefix", {"router": "rmoe"}, "router must be one of classic"),
        ("mode", {"architecture_options": {"reads": "noise"}}, "reads"),
        ("mode", {"architecture_options": {"inner_width": 0}}, "inner_width"),
        ("glider", {"architecture_options": {"scale": 3}}, "unknown option"),
        ("feature groups", {"architecture_options": {"shared_width": 9}}, "must divide"),
        ("feature groups", {"num_shared_experts": 1}, "no zero-compute or shared"),
        ("mixture of transformers", {"architecture_options": {"first_ids": [0, 30]}}, "each of the 3 modalities"),
        ("mixture of transformers", {"architecture_options": {"first_ids": [0, 60, 30]}}, "rising from 0"),
        ("mixture of transformers", {"num_experts_per_tok": 2}, "must be 1"),
        ("mixture of transformers", {"num_dense_layers": 1}, "num_dense_layers must be 0"),
    ],
)
def test_bad_options_say_what_was_expected(name, overrides, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        MoEForCausalLM(tiny_config(**(CASES[name] | overrides)))


def test_bad_signals_say_what_was_expected(tiny_config):
    model, token_BS = model_of(tiny_config, CASES["mode"]), torch.randint(0, 96, (2, 5))
    for extra, message in (
        ({"condition": torch.zeros(3, 32)}, r"\[2, 32\]"),
        ({"modality": torch.zeros(2, 4, dtype=torch.int64)}, r"\[2, 5\]"),
        ({"logit_bias_LR": torch.zeros(6)}, "routable experts"),
    ):
        with pytest.raises(ValueError, match=message):
            model(token_BS, **extra)
    for scale in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="scale"):
            task_bias(torch.zeros(4), torch.zeros(3, 6, 4), scale)
    with pytest.raises(ValueError, match="task embedding"):
        task_bias(torch.zeros(4), torch.zeros(3, 6, 5), 1.0)
