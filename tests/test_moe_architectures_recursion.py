"""Mixture-of-Recursions: against plain loops, decoding, caches, padding, and the traps of the official code."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import offload
from experiments.compare.measures.flops import measured_usage, token_flops
from moe import MoEForCausalLM
from moe.architectures.recursion.depth import TokenChoiceDepth

LAYERS = {"num_hidden_layers": 4, "intermediate_size": 40, "architecture": "mixture_of_recursions"}
CASES = {
    "expert": {"choice": "expert"},
    "expert first keys": {"choice": "expert", "keys": "first", "recursions": 3},
    "expert separate mlp": {"choice": "expert", "predictor": "separate", "router": "mlp"},
    "token": {"choice": "token", "recursions": 3},
    "token bias first keys": {"choice": "token", "balance": "bias", "score": "sigmoid", "keys": "first"},
    "none": {"choice": "none", "recursions": 3},
    "none first keys": {"choice": "none", "keys": "first"},
    "expert moe": {"choice": "expert", "feed_forward": "moe", "recursions": 3},
    "token moe first keys": {"choice": "token", "feed_forward": "moe", "keys": "first"},
}
each_case = pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))


@pytest.fixture
def build(tiny_config):
    def make(options, **overrides):
        options = {"feed_forward": "dense", **options}
        return MoEForCausalLM(tiny_config(**(LAYERS | overrides), architecture_options=options)).eval()

    return make


@each_case
def test_left_padding_does_not_change_what_is_generated(build, options):
    model = build(options)
    prompt = torch.randint(1, 96, (1, 7))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1)
    batch = torch.cat([padded, torch.randint(1, 96, (1, 11))])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    alone = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 7:]
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)[0, 11:]
    assert torch.equal(alone, together)


# --- against plain loops --------------------------------------------------------------------------------------------


def rotated(x, position, theta=10_000.0):
    half = len(x) // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float32) * 2 / len(x))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def rms(x, norm):
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def head_keys(layer, x, position):
    """Key and value of one token, per key head."""
    attention, normed = layer.self_attn, rms(x, layer.input_layernorm)
    keys = (attention.k_proj.weight @ normed).view(2, 8)
    values = (attention.v_proj.weight @ normed).view(2, 8)
    return [(rotated(rms(key, attention.k_norm), position), value) for key, value in zip(keys, values, strict=True)]


def layer_by_loops(layer, xs, positions, lent=None):
    """A dense decoder layer on some tokens of a row; `lent` are keys per position to look at instead of their own."""
    attention = layer.self_attn
    own = {place: head_keys(layer, x, place) for x, place in zip(xs, positions, strict=True)}
    keys = lent or own
    found = []
    for x, place in zip(xs, positions, strict=True):
        queries = (attention.q_proj.weight @ rms(x, layer.input_layernorm)).view(4, 8)
        heads = []
        for head, query in enumerate(queries):
            query = rotated(rms(query, attention.q_norm), place)
            seen = [keys[other][head // 2] for other in sorted(keys) if other <= place]
            score = torch.stack([query @ key / 8**0.5 for key, _ in seen]).softmax(dim=0)
            heads.append(sum(weight * value for weight, (_, value) in zip(score, seen, strict=True)))
        x = x + attention.o_proj.weight @ torch.cat(heads)
        inner = rms(x, layer.post_attention_layernorm)
        gate = layer.mlp.gate_proj.weight @ inner
        found.append(x + layer.mlp.down_proj.weight @ (gate * gate.sigmoid() * (layer.mlp.up_proj.weight @ inner)))
    return found, own


def block_by_loops(model, xs, positions, lent):
    """The two middle layers; `lent` holds the first recursion's keys per layer and is filled by it."""
    for index in (1, 2):
        xs, own = layer_by_loops(
            model.model.layers[index], xs, positions, lent.get(index) if lent is not None else None
        )
        if lent is not None:
            lent.setdefault(index, own)
    return xs


def expert_choice_by_loops(model, xs, keys, recursions, is_training):
    depth = model.model.stack.depth
    lent, alive, cost = {} if keys == "first" else None, list(range(len(xs))), []
    for recursion in range(recursions):
        logits = {place: (depth.routers[recursion].weight @ xs[place])[0] for place in alive}
        if recursion and is_training:
            best = sorted(alive, key=lambda place, z=logits: -z[place])
            picked = sorted(best[: max(1, (recursions - recursion) * len(xs) // recursions)])
        else:
            picked = [place for place in alive if recursion == 0 or logits[place] > 0]
        cost += [(recursion, logits[place], float(place in picked)) for place in alive]
        new = block_by_loops(model, [xs[place] for place in picked], picked, lent) if picked else []
        xs = list(xs)
        for place, y in zip(picked, new, strict=True):
            xs[place] = xs[place] + 0.1 * logits[place].sigmoid() * y
        alive = picked
    return xs, cost


def token_choice_by_loops(model, xs, keys, recursions):
    depth, lent = model.model.stack.depth, {} if keys == "first" else None
    first, second = depth.router[0].weight, depth.router[2].weight
    scores = [(second @ torch.nn.functional.gelu(first @ x)).softmax(dim=0) for x in xs]
    depths = [int(score.argmax()) for score in scores]
    state = list(xs)
    for recursion in range(recursions):
        alive = [place for place in range(len(xs)) if depths[place] >= recursion]
        new = block_by_loops(model, [state[place] for place in alive], alive, lent) if alive else []
        for place, y in zip(alive, new, strict=True):
            state[place] = y
    rows = zip(xs, scores, depths, state, strict=True)
    return [x + score[own] * y for x, score, own, y in rows], depths


def logits_by_loops(model, row, choice, keys, recursions, is_training=False):
    layers, positions = model.model.layers, list(range(len(row)))
    xs, _ = layer_by_loops(layers[0], [model.model.embed_tokens.weight[token] for token in row], positions)
    if choice == "expert":
        xs, extra = expert_choice_by_loops(model, xs, keys, recursions, is_training)
    else:
        xs, extra = token_choice_by_loops(model, xs, keys, recursions)
    xs, _ = layer_by_loops(layers[3], xs, positions)
    return torch.stack([model.lm_head.weight @ rms(x, model.model.norm) for x in xs]), extra


@pytest.mark.parametrize("keys", ["recursion", "first"])
@pytest.mark.parametrize("choice", ["expert", "token"])
@pytest.mark.parametrize("is_training", [True, False], ids=["top-k", "threshold"])
def test_forward_and_every_gradient_equal_plain_loops(build, tolerance, choice, keys, is_training):
    """Expert choice by top-k in training and by the threshold outside it; token choice is the same in both."""
    model = build({"choice": choice, "keys": keys, "recursions": 3}).double().train(is_training)
    token_BS = torch.randint(96, (2, 6))
    ours = model(token_BS).logits
    rows = [logits_by_loops(model, row.tolist(), choice, keys, 3, is_training) for row in token_BS]
    theirs = torch.stack([logits for logits, _ in rows])
    torch.testing.assert_close(ours, theirs, **tolerance[torch.float64])
    weight = torch.randn_like(ours)
    parameters = list(model.parameters())
    found = torch.autograd.grad((ours * weight).sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad((theirs * weight).sum(), parameters, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance[torch.float64])


# --- losses ---------------------------------------------------------------------------------------------------------


def test_the_expert_choice_loss_is_the_mean_cross_entropy_of_having_been_picked(build, tolerance):
    model = build({"recursions": 3, "loss_weight": 0.5}).double().train()
    token_BS = torch.randint(96, (2, 6))
    cost = [
        entry for row in token_BS for entry in logits_by_loops(model, row.tolist(), "expert", "recursion", 3, True)[1]
    ]
    expected = 0.0
    for recursion in range(3):
        own = [(logit, target) for r, logit, target in cost if r == recursion]
        logits, targets = torch.stack([z for z, _ in own]), torch.tensor([t for _, t in own], dtype=torch.float64)
        expected = expected + 0.5 / 3 * binary_cross_entropy_with_logits(logits, targets)
    output = model(token_BS, labels=token_BS)
    torch.testing.assert_close(output.losses["depth"], expected, **tolerance[torch.float64])
    torch.testing.assert_close(output.loss, output.lm_loss + expected, **tolerance[torch.float64])


def test_the_token_choice_loss_is_share_times_probability(build, tolerance):
    model = build({"choice": "token", "recursions": 3, "z_weight": 0.0}).double().train()
    token_BS = torch.randint(96, (2, 6))
    output = model(token_BS, labels=token_BS)
    depths = [own for row in token_BS for own in logits_by_loops(model, row.tolist(), "token", "recursion", 3)[1]]
    seen = {}
    model.model.stack.depth.register_forward_pre_hook(lambda _m, inputs: seen.update(x=inputs[0]))
    model(token_BS)
    score_TJ = model.model.stack.depth.router(seen["x"].flatten(0, 1)).softmax(dim=-1)
    share_J = torch.tensor([depths.count(place) / 12 for place in range(3)], dtype=torch.float64)
    expected = 0.1 * 3 * (share_J * score_TJ.mean(dim=0)).sum()
    torch.testing.assert_close(output.losses["depth"], expected, **tolerance[torch.float64])


def test_losses_do_not_depend_on_the_number_of_rows(build):
    """Trap: the official code divides auxiliary terms by the number of items in the batch."""
    for options in ({"z_weight": 1e-2}, {"choice": "token", "z_weight": 1e-2}):
        model = build(options).double().train()
        token_BS = torch.randint(96, (2, 8))
        once, twice = model(token_BS), model(token_BS.repeat(2, 1))
        assert set(once.losses or {}) == {"depth", "depth_z"}
        for name, loss in once.losses.items():
            torch.testing.assert_close(loss, twice.losses[name])


def test_a_separate_predictor_learns_from_its_own_loss_only(build):
    model = build(CASES["expert separate mlp"]).train()
    token_BS = torch.randint(96, (2, 8))
    output = model(token_BS, labels=token_BS)
    trained = list(model.model.stack.depth.predictors.parameters())
    others = [p for p in model.parameters() if not any(p is own for own in trained)]
    by_loss = torch.autograd.grad(output.losses["depth"], [*trained, *others], retain_graph=True, allow_unused=True)
    assert all(g is not None and g.any() for g in by_loss[: len(trained)])
    assert all(g is None for g in by_loss[len(trained) :])
    by_text = torch.autograd.grad(output.lm_loss, trained, allow_unused=True)
    assert all(g is None for g in by_text)


def test_the_balancing_bias_moves_after_steps_and_never_enters_the_gate(build):
    model = build({"choice": "token", "balance": "bias"}).train()
    depth, token_BS = model.model.stack.depth, torch.randint(96, (2, 8))
    model(token_BS, labels=token_BS)
    count_J = depth.count_J.clone()
    assert count_J.sum() == 16
    model.model.post_step([], 16)
    assert torch.equal(depth.bias_J, 1e-3 * (count_J.mean() - count_J).sign())
    assert not depth.count_J.any()
    depth.bias_J = torch.tensor([0.0, 100.0])
    x_BSD, valid = torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.bool)
    choice = depth(x_BSD, valid, False)
    assert choice.is_alive_BS[1].all()
    torch.testing.assert_close(choice.gate_BS, depth.router(x_BSD).softmax(dim=-1)[..., 1])
    assert model.bfloat16().model.stack.depth.bias_J.dtype == torch.float32


@pytest.mark.parametrize("name", ["expert", "token", "expert moe"])
def test_every_parameter_gets_a_gradient(build, name):
    model = build(CASES[name]).train()
    token_BS = torch.randint(96, (4, 30))
    model(token_BS, labels=token_BS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- traps ----------------------------------------------------------------------------------------------------------


def test_a_single_token_is_not_always_picked(build):
    """Trap: with k = max(1, int(c S)) every step of one token would pass all recursions."""
    model = build({"recursions": 2})
    alive = []
    stack = model.model.stack
    stack.depth.register_forward_hook(lambda _m, inputs, out: alive.append((inputs[0], out.is_alive_BS)))
    for token in range(40):
        model(torch.tensor([[token]]))
    later = torch.cat([is_alive.flatten() for recursion, is_alive in alive if recursion == 1])
    assert 0 < later.sum() < 40


@each_case
def test_the_future_does_not_leak_into_the_past_outside_training(build, options):
    model = build(options)
    first, second = torch.randint(96, (1, 12)), torch.randint(96, (1, 12))
    second[:, :6] = first[:, :6]
    with torch.no_grad():
        torch.testing.assert_close(model(first).logits[:, :6], model(second).logits[:, :6])


def test_top_k_outside_training_sees_the_future_and_refuses_to_generate(build):
    """The published evaluation; here it scores whole rows only."""
    model = build({"inference": "top_k"})
    prompt = torch.randint(1, 96, (1, 12))
    with pytest.raises(ValueError, match="not causal"):
        model.generate(prompt, max_new_tokens=2)
    with torch.no_grad():
        trained = build({"inference": "threshold"})
        trained.load_state_dict(model.state_dict())
        passes = model(prompt).passes[1]
        assert passes.tokens == 1.5
        assert torch.equal(model(prompt).logits, trained.train()(prompt).logits)


def test_a_row_without_tokens_left_does_not_change_the_others(build):
    """Trap: the official token-choice combine indexes weights by the place in the list of rows that are left."""
    model = build({"choice": "token", "recursions": 3}).double()
    token_BS = torch.randint(96, (40, 2))
    with torch.no_grad():
        together = model(token_BS).logits
        alone = torch.cat([model(row[None]).logits for row in token_BS])
        depth = model.model.stack.depth(
            model.model.layers[0](*first_layer_inputs(model, token_BS))[0], torch.ones(40, 2).bool(), False
        )
    rows_left = depth.is_alive_BS[2].any(dim=1)
    assert 0 < rows_left.sum() < 40
    torch.testing.assert_close(together, alone)


def first_layer_inputs(model, token_BS):
    seen = {}
    handle = model.model.layers[0].register_forward_pre_hook(lambda _m, inputs: seen.update(inputs=inputs))
    model(token_BS)
    handle.remove()
    return seen["inputs"]


@pytest.mark.parametrize("keys", ["recursion", "first"])
def test_later_recursions_compute_only_the_tokens_that_are_alive(build, keys):
    """Trap: the official key-sharing path computes the whole sequence and masks, so it saves nothing."""
    model = build({"recursions": 3, "keys": keys}).train()
    widths, projected = [], []
    model.model.layers[1].register_forward_pre_hook(lambda _m, inputs: widths.append(inputs[0].shape[1]))
    model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda _m, inputs, _o: projected.append(inputs[0].shape[1])
    )
    output = model(torch.randint(96, (2, 12)))
    assert widths == [12, 8, 4]
    assert projected == ([12, 8, 4] if keys == "recursion" else [12])
    assert output.passes[1].tokens == pytest.approx(2)
    assert output.passes[1].keys == pytest.approx(2 if keys == "recursion" else 1)
    assert output.passes[0].tokens == output.passes[3].tokens == 1


def test_each_recursion_picks_among_those_of_the_one_before(build):
    model = build({"recursions": 3}).train()
    alive = []
    model.model.stack.depth.register_forward_hook(lambda _m, _i, out: alive.append(out.is_alive_BS))
    model(torch.randint(96, (3, 12)))
    assert [int(one.sum()) for one in alive] == [36, 24, 12]
    assert not (alive[2] & ~alive[1]).any()


def test_capacity_counts_the_tokens_of_a_row_and_not_its_padding(build):
    model = build({"recursions": 2}).train()
    token_BS, mask = torch.randint(96, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :6] = 0
    alive = []
    model.model.stack.depth.register_forward_hook(lambda _m, _i, out: alive.append(out.is_alive_BS))
    model(token_BS, attention_mask=mask)
    assert alive[1].sum(dim=1).tolist() == [3, 6]
    assert not alive[1][0, :6].any()


# --- the cache ------------------------------------------------------------------------------------------------------


def test_the_cache_of_a_recursion_holds_its_tokens_only(build):
    model = build({"recursions": 2})
    token_BS = torch.randint(96, (1, 30))
    with torch.no_grad():
        output = model(token_BS, use_cache=True)
        alive = round(30 * (output.passes[1].tokens - 1))
        assert 0 < alive < 30
        assert [layer.get_seq_length() for layer in output.past_key_values.layers] == [30] * 4 + [alive] * 2
        shared = build({"recursions": 2, "keys": "first"})
        assert [layer.get_seq_length() for layer in shared(token_BS, use_cache=True).past_key_values.layers] == [30] * 4


@pytest.mark.parametrize("name", ["expert", "token", "none"])
def test_a_cropped_cache_continues_as_if_the_rest_had_not_been(build, tolerance, name):
    model = build(CASES[name]).double()
    token_BS = torch.randint(96, (2, 12))
    with torch.no_grad():
        whole = model(token_BS).logits
        cache = model(token_BS[:, :10], use_cache=True).past_key_values
        cache.crop(-4)
        rest = model(token_BS[:, 6:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 6:], **tolerance[torch.float64])


@pytest.mark.parametrize("name", ["expert", "expert first keys", "token"])
def test_beam_search_with_the_cache_equals_beam_search_without(build, name):
    model = build(CASES[name])
    prompt = torch.randint(1, 96, (2, 6))
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(prompt, use_cache=True, **settings), model.generate(prompt, use_cache=False, **settings)
    )


# --- the rest -------------------------------------------------------------------------------------------------------


def test_one_recursion_is_the_plain_stack(tiny_config, build):
    plain = MoEForCausalLM(tiny_config(num_hidden_layers=4)).eval()
    once = build({"recursions": 1, "feed_forward": "moe"})
    once.load_state_dict(plain.state_dict())
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(plain(token_BS).logits, once(token_BS).logits)


def test_recursion_without_a_router_is_a_plain_stack_with_tied_layers(build, tolerance):
    tied = build({"choice": "none", "recursions": 3}).double()
    plain = build({"recursions": 1}, num_hidden_layers=8).double()
    state, layers = tied.state_dict(), [0, 1, 2, 1, 2, 1, 2, 3]
    unrolled = {name: value for name, value in state.items() if ".layers." not in name}
    for place, layer in enumerate(layers):
        prefix = f"model.layers.{layer}."
        own = {name: value for name, value in state.items() if name.startswith(prefix)}
        unrolled |= {name.replace(prefix, f"model.layers.{place}."): value for name, value in own.items()}
    plain.load_state_dict(unrolled)
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(tied(token_BS).logits, plain(token_BS).logits, **tolerance[torch.float64])


@pytest.mark.parametrize("router", ["olmoe", "rmoe", "moepp"])
def test_the_carry_follows_its_tokens_through_recursions(build, tolerance, router):
    """Recurrent state and earlier logits of a token come back with it: alone or in a batch, it routes the same."""
    options = {"state_width": 16} if router == "rmoe" else {}
    zero_compute = ["zero", "copy"] if router == "moepp" else []
    extra = {"router": router, "router_options": options, "zero_compute_experts": zero_compute}
    model = build({"feed_forward": "moe", "recursions": 3}, **extra).double()
    token_BS = torch.randint(96, (3, 9))
    with torch.no_grad():
        together = model(token_BS)
        for row, tokens in enumerate(token_BS):
            alone = model(tokens[None])
            torch.testing.assert_close(together.logits[row], alone.logits[0], **tolerance[torch.float64])
    assert len(together.router_stats) == 4
    assert together.router_stats[1].num_tokens == round(27 * together.passes[1].tokens)


@pytest.mark.parametrize("keys", ["recursion", "first"])
def test_offloaded_equals_resident_at_every_cache_size(build, tmp_path, keys):
    resident = build({"feed_forward": "moe", "recursions": 3, "keys": keys})
    resident.save_pretrained(tmp_path)
    prompt = torch.randint(0, 96, (1, 6))
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    reference = offload.load(tmp_path, cache_experts=6).generate(prompt, **settings)
    assert torch.equal(reference.sequences, resident.generate(prompt, **settings).sequences)
    for slots in range(1, 6):
        ours = offload.load(tmp_path, cache_experts=slots).generate(prompt, **settings)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, reference.logits, strict=True))


def test_operations_count_each_pass(build):
    """D 32, heads 4 and 2 of 8, F 40, S 12: recursion 1 takes half of the tokens, which attend to each other only."""
    model = build({"recursions": 2}).train()
    output = model(torch.randint(96, (1, 12)))
    usage = measured_usage([output], 12)
    flops = token_flops(model, usage, sequence_length=12)
    projections, scores = 2 * 32 * (32 + 16 + 16 + 32), 2 * 2 * 32 * 6.5
    pairs = (6 * 7 / 2) / (12 * 13 / 2)
    assert flops.shared == pytest.approx((2 + 2 * 1.5) * 6 * 32 * 40)
    assert flops.attention == pytest.approx(2 * (projections + scores) + 2 * (1.5 * projections + (1 + pairs) * scores))
    assert flops.router == 2 * 2 * 32
    whole = replace(usage, layer_passes=None)
    assert token_flops(model, whole, sequence_length=12).shared == 4 * 6 * 32 * 40


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({"recursions": 0}, {}, "recursions must be at least 1; got 0"),
        ({"choice": "both"}, {}, "choice must be one of expert, token, none; got 'both'"),
        ({"keys": "last"}, {}, "keys must be one of recursion, first"),
        ({"first": 2, "last": 2}, {}, "must leave at least one of 4 layers to recur"),
        ({"inference": "guess"}, {}, "inference must be one of threshold, top_k"),
        ({"depth": 3}, {}, "unknown option"),
        ({"feed_forward": "moe"}, {"router": "pregate"}, "'pregate' cannot recur"),
        ({"choice": "token", "predictor": "separate"}, {}, "predictor is an option of choice='expert'; this model has"),
        ({"choice": "expert", "score": "sigmoid"}, {}, "score is an option of choice='token'; this model has"),
        ({"choice": "none", "alpha": 0.5}, {}, "alpha is an option of choice='expert' or 'token'; this model has"),
        ({"balance": "bias"}, {}, "balance is an option of choice='token'; this model has choice='expert'"),
        ({"recursion": 3}, {}, "did you mean 'recursions'"),
        ({"alpha": "big"}, {}, "alpha must be a finite number; got 'big'"),
    ],
)
def test_recursions_that_make_no_sense_are_refused(build, options, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(options, **overrides)


def test_options_left_to_none_take_the_defaults_of_their_choice(build):
    plain, spelt = (
        build({"choice": "token"}),
        build({"choice": "token", "router": None, "alpha": None, "z_weight": None}),
    )
    assert (plain.model.stack.depth.alpha, spelt.model.stack.depth.alpha) == (1.0, 1.0)
    assert plain.state_dict().keys() == spelt.state_dict().keys()
    sigmoid = build({"choice": "token", "score": "sigmoid"}).model.stack.depth
    assert (sigmoid.alpha, sigmoid.loss_weight, sigmoid.z_weight) == (0.1, 0.1, 1e-5)
    expert = build({}).model.stack.depth
    assert (expert.alpha, expert.loss_weight, expert.z_weight) == (0.1, 1e-3, 0.0)


def test_depth_scores_that_vanish_give_a_finite_loss():
    depth = TokenChoiceDepth(8, 3, kind="linear", score="sigmoid").train()
    with torch.no_grad():
        depth.router.weight.zero_()
        depth.router.weight[:, 0] = -120.0
    x_BSD = torch.zeros(1, 5, 8, requires_grad=True)
    x_BSD.data[..., 0] = 1.0
    choice = depth(x_BSD, torch.ones(1, 5, dtype=torch.bool), is_training=True)
    choice.losses["depth"].backward()
    assert choice.losses["depth"].item() == pytest.approx(0.1)
    assert x_BSD.grad.isfinite().all()
