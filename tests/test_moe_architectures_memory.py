"""PEER and UltraMemV2: against plain loops over every expert, memory at a million experts, the whole model."""

import pytest
import torch
from torch.nn.functional import gelu
from transformers import AutoModelForCausalLM

import routing.choice.table_rows
from experiments.evidence.live_bytes import LiveBytes
from moe import MoEForCausalLM
from moe.architectures import build_body
from moe.architectures.memory.ultramem import Shuffle
from routing import BALANCE_LOSSES, Carry, RoutingContext, gather_dot, gather_sum

OPTIONS = {
    "peer": {"num_heads": 2, "key_width": 8},
    "ultramem": {"key_width": 8, "pre_value_width": 6, "value_width": 10, "layers_per_table": 2},
}


def memory_config(tiny_config, name, **overrides):
    sizes = {"num_experts": 49 if name == "peer" else 36, "num_experts_per_tok": 3, "num_shared_experts": 1}
    options = OPTIONS[name] | overrides.pop("options", {})
    return tiny_config(**(sizes | {"architecture": name, "architecture_options": options} | overrides))


def layer_of(tiny_config, name, **overrides):
    model = MoEForCausalLM(memory_config(tiny_config, name, **overrides)).double().eval()
    return model.model.moe_layers[0]


@pytest.fixture(params=OPTIONS)
def name(request):
    return request.param


@pytest.fixture
def few_at_once(monkeypatch):
    """Chunks of one or two tokens, so that tests cross their borders."""
    monkeypatch.setattr(routing.choice.table_rows, "ELEMENTS_AT_ONCE", 100)


def grads(result, inputs):
    return torch.autograd.grad((result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum(), inputs)


@pytest.mark.usefixtures("few_at_once")
def test_gathered_products_and_their_gradients():
    x, table = torch.randn(5, 4).double().requires_grad_(), torch.randn(7, 4).double().requires_grad_()
    weight, row = torch.randn(5, 9).double().requires_grad_(), torch.randint(7, (5, 9))
    for ours, plain, inputs in (
        (gather_dot(x, table, row), (table[row] * x[:, None]).sum(-1), (x, table)),
        (gather_sum(weight, table, row), (table[row] * weight[..., None]).sum(1), (weight, table)),
    ):
        torch.testing.assert_close(ours, plain)
        for a, b in zip(grads(ours, inputs), grads(plain, inputs), strict=True):
            torch.testing.assert_close(a, b)


def peer_by_loops(layer, x_TD):
    """Every expert's score, neuron by neuron."""
    router, rows = layer.router, layer.router.num_rows
    mean, variance = router.query_mean.double(), router.query_variance.double()
    outputs = []
    for x in x_TD:
        y = torch.zeros_like(x)
        query = ((router.query @ x) - mean) / (variance + 1e-5).sqrt()
        for head in query.view(router.num_heads, 2, -1):
            scores = [
                head[0] @ router.keys[0, i] + head[1] @ router.keys[1, j] for i in range(rows) for j in range(rows)
            ]
            score, expert = torch.stack(scores).topk(router.sizes.top_k)
            for weight, e in zip(score.softmax(0), expert.tolist(), strict=True):
                y = y + weight * gelu(layer.experts.down[e] @ x) * layer.experts.up[e]
        outputs.append(y + layer.shared(x))
    return torch.stack(outputs)


def rms(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def ultramem_by_loops(layer, x_TD):
    router, table, K = layer.router, layer._shared_table[0], layer.router.sizes.top_k
    ranks, rows, cores = router.ranks, router.num_rows, len(router.core)
    u, _, v = torch.linalg.svd(router.core.detach().sum(0))
    u, v = u[:, 0], v[0]
    if u.sum() + v.sum() < 0:
        u, v = -u, -v
    keys, outputs = rms(router.keys, router.key_gain), []
    for x in x_TD:
        parts = torch.zeros(cores, table.values[0].shape[-1], dtype=x.dtype)
        pre = layer.pre_proj(x)
        for head in (router.query @ x).view(router.num_heads, 2, ranks, -1):
            query = rms(head, router.query_gain)
            side = [
                torch.stack([torch.stack([query[h, r] @ keys[h, r, i] for i in range(rows)]) for r in range(ranks)])
                for h in (0, 1)
            ]
            row, column = (u @ side[0]).topk(K).indices.tolist(), (v @ side[1]).topk(K).indices.tolist()
            pairs = [(i, j) for i in row for j in column]
            scores = torch.stack([side[0][:, i] @ router.core.sum(0) @ side[1][:, j] for i, j in pairs])
            for chosen in scores.topk(K).indices.tolist():
                i, j = pairs[chosen]
                value = int(layer.value_rows(torch.tensor(i * rows + j)))
                gate = table.pre_values[value] @ pre
                each = [side[0][:, i] @ core @ side[1][:, j] * gate for core in router.core]
                parts = parts + torch.stack([each[c] * table.values[c][value] for c in range(cores)])
        outputs.append(layer.out_proj(parts.flatten()) + layer.shared(x))
    return torch.stack(outputs)


@pytest.mark.usefixtures("few_at_once")
def test_layer_equals_plain_loops_forward_and_every_gradient(name, tiny_config, tolerance):
    layer = layer_of(tiny_config, name)
    for buffer in (getattr(layer.router, "query_mean", None), getattr(layer.router, "query_variance", None)):
        if buffer is not None:
            buffer.add_(torch.rand_like(buffer))
    x_TD = torch.randn(5, 32).double().requires_grad_()
    inputs = [x_TD, *layer.parameters()]
    ours, _, _ = layer(x_TD, Carry(), RoutingContext())
    plain = (peer_by_loops if name == "peer" else ultramem_by_loops)(layer, x_TD)
    torch.testing.assert_close(ours, plain, **tolerance[torch.float64])
    for a, b in zip(grads(ours, inputs), grads(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_pairs_that_are_left_out_are_never_among_the_best(k, tiny_config):
    router = layer_of(tiny_config, "peer").router
    query = torch.randn(20, 2, 2, 4).double()
    row, column = (query[:, :, half] @ router.keys[half].T for half in (0, 1))
    best = (row[..., :, None] + column[..., None, :]).flatten(-2).topk(k)
    found = router.select(query, k, None)
    assert torch.equal(found.row_THK * 7 + found.column_THK, best.indices)
    torch.testing.assert_close(found.score_THK, best.values)
    assert sum(router.paired_columns(7)) == 7 + 3 + 2 + 1 + 1 + 1 + 1


def million_experts(tiny_config, name):
    options = {"num_heads": 1, "key_width": 8} if name == "peer" else {"pre_value_width": 2, "value_width": 4}
    sizes = {"num_experts": 1_000_000, "num_experts_per_tok": 8, "num_shared_experts": 0, "num_hidden_layers": 1}
    config = memory_config(tiny_config, name, options=options, hidden_size=8, **sizes)
    return build_body(config).layers[0]


def test_memory_at_a_million_experts_is_that_of_the_tokens_and_the_root(name, tiny_config):
    """Beyond tables and their gradients; twice the tokens make at most twice the bytes, far below T * sqrt(N)."""
    layer, T = million_experts(tiny_config, name), 8192
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.router.init_parameters(0.02)
    peaks = []
    for num_tokens in (T, 2 * T):
        x_TD = torch.randn(num_tokens, 8)
        with LiveBytes() as forward, torch.no_grad():
            layer(x_TD, Carry(), RoutingContext())
        peaks.append(forward.peak)
    token_bytes, root_bytes = T * 8 * 4, 1000 * 4
    working = 16 * routing.choice.table_rows.ELEMENTS_AT_ONCE
    assert peaks[0] < 32 * token_bytes + 64 * root_bytes + working
    assert peaks[1] - peaks[0] < 32 * token_bytes
    assert peaks[1] < 2 * T * 1000 * 4, "less than scores of all rows would take, let alone of all experts"


def test_training_a_million_experts_holds_tables_gradients_and_tokens_only(name, tiny_config):
    layer, T = million_experts(tiny_config, name), 4096
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.router.init_parameters(0.02)
    tables = sum(p.numel() * 4 for p in layer.parameters())
    x_TD = torch.randn(T, 8, requires_grad=True)
    with LiveBytes() as training:
        y_TD, _, _ = layer(x_TD, Carry(), RoutingContext(is_training=True))
        y_TD.sum().backward()
    working = 32 * routing.choice.table_rows.ELEMENTS_AT_ONCE
    assert training.peak < tables + 64 * T * 8 * 4 + working, "gradients of tables count where torch makes them"
    assert training.largest <= max(p.numel() * 4 for p in layer.parameters())


@pytest.mark.usefixtures("few_at_once")
def test_statistics_are_those_of_rows_and_columns(tiny_config):
    layer = layer_of(tiny_config, "peer", options={"grid_loss": "switch", "query_norm": "layer"})
    router, x_TD = layer.router, torch.randn(6, 32).double()
    valid = torch.tensor([True, True, False, True, True, True])
    _, _, (stats,) = layer(x_TD, Carry(), RoutingContext(is_training=True, is_valid_T=valid))
    found, _, _ = router(x_TD[valid], Carry(), RoutingContext())
    row, column = found.expert_TK // 7, found.expert_TK % 7
    counts = [torch.bincount(place.flatten(), minlength=7) for place in (row, column)]
    assert stats.count_R.tolist() == torch.cat(counts).tolist()
    query = torch.nn.functional.layer_norm((x_TD[valid] @ router.query.T).view(5, 2, 8), (8,)).view(5, 2, 2, 4)
    shares = [(query[:, :, h] @ router.keys[h].T).softmax(-1) for h in (0, 1)]
    torch.testing.assert_close(stats.probability_R, torch.cat([s.mean((0, 1)) for s in shares]) / 2)
    entropies = [torch.special.entr(s).sum(-1).mean() for s in shares]
    torch.testing.assert_close(stats.entropy, (entropies[0] + entropies[1]) / 2)
    losses = [7 * (c / c.sum() * s.mean((0, 1))).sum() for c, s in zip(counts, shares, strict=True)]
    expected = (losses[0] + losses[1]) / 2
    loss = BALANCE_LOSSES["switch"](stats)
    torch.testing.assert_close(loss, expected)
    inputs = (router.query, router.keys)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)
    assert stats.num_tokens == 5
    assert stats.true_load == 6


def test_trap_peer_gates_compete_within_a_head(tiny_config):
    """The known port uses ReLU gates by default, and then one expert per head; the paper a softmax over the K."""
    layer = layer_of(tiny_config, "peer")
    routing, _, _ = layer.router(torch.randn(4, 32).double(), Carry(), RoutingContext())
    weight = routing.weight_TK.view(4, 2, 3)
    torch.testing.assert_close(weight.sum(-1), torch.ones(4, 2, dtype=torch.float64))
    assert (weight > 0).all()


def test_trap_peer_normalises_queries_over_the_batch_in_training_and_not_outside(tiny_config):
    layer = layer_of(tiny_config, "peer")
    x_TD, router = torch.randn(16, 32).double() + 3, layer.router
    router(x_TD, Carry(), RoutingContext(is_training=True))
    assert router.query_mean.abs().max() == 0, "a forward pass changes nothing, it may be a recomputation"
    router.post_step(torch.zeros(14), 16)
    query = x_TD @ router.query.T
    torch.testing.assert_close(router.query_mean, 0.1 * query.mean(0).to(router.query_mean))
    alone, _, _ = router(x_TD[:1], Carry(), RoutingContext())
    together, _, _ = router(x_TD, Carry(), RoutingContext())
    assert torch.equal(alone.expert_TK[0], together.expert_TK[0])


def test_trap_the_proxy_keeps_its_sign_from_step_to_step(tiny_config):
    """Singular vectors are defined up to a common sign; the other one would select the lowest scores."""
    router = layer_of(tiny_config, "ultramem").router
    before = router.proxy(torch.float64)
    assert before[0].sum() + before[1].sum() > 0
    with torch.no_grad():
        for _ in range(60):  # turns the leading vectors to the opposite side little by little
            router.core[:] = _turned(router.core, 0.06)
            router.post_step(torch.zeros(12), 1)
            after = router.proxy(torch.float64)
            assert (before[0] @ after[0]) + (before[1] @ after[1]) > 1.9
            before = after
    assert after[0].sum() + after[1].sum() < 0


def _turned(core, angle):
    cos, sin = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=core.dtype)
    return turn @ core @ turn.T


def test_trap_ultramem_has_no_activation_and_raw_scores(tiny_config):
    """The read-out is linear in pre-values and values, and of degree one in the core."""
    layer = layer_of(tiny_config, "ultramem", num_shared_experts=0)
    x_TD = torch.randn(3, 32).double()
    base, _, _ = layer(x_TD, Carry(), RoutingContext())
    with torch.no_grad():
        layer.experts.pre_values *= -2
        layer.router.core *= 3
    scaled, _, _ = layer(x_TD, Carry(), RoutingContext())
    torch.testing.assert_close(scaled, -6 * base)


def test_shuffle_is_one_to_one_and_every_value_has_as_many_places(tiny_config):
    shuffled = Shuffle(num_rows=6, seed=1)(torch.arange(36))
    assert sorted(shuffled.tolist()) == list(range(36))
    assert shuffled.tolist() != list(range(36))
    layer = layer_of(tiny_config, "ultramem", options={"expand": 3})
    assert torch.bincount(layer.value_rows(torch.arange(36))).tolist() == [3] * 12


def test_layers_share_values_with_an_offset(tiny_config):
    model = MoEForCausalLM(memory_config(tiny_config, "ultramem", options={"layers_per_table": 3}))
    layers = model.model.moe_layers
    assert len({id(layer._shared_table[0]) for layer in layers}) == 1
    assert [layer.offset for layer in layers] == [0, 6, 12]
    assert sum("pre_values" in key for key in model.state_dict()) == 1


def test_model_trains_generates_and_comes_back_bit_for_bit(name, tiny_config, tmp_path):
    model = MoEForCausalLM(memory_config(tiny_config, name)).train()
    token_BS = torch.randint(0, 96, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        output = model(token_BS, labels=token_BS)
        output.loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        optimizer.step()
        optimizer.zero_grad()
        model.model.post_step([stats.count_R for stats in output.router_stats], 32)
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(token_BS).logits, loaded(token_BS).logits)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    buffers = dict(small.named_buffers())
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers() if value.is_floating_point())
    assert small(token_BS).logits.isfinite().all()


def test_left_padding_does_not_change_what_is_generated(name, tiny_config):
    model = MoEForCausalLM(memory_config(tiny_config, name)).double().eval()
    prompt = torch.randint(0, 96, (2, 7))
    made = model.generate(prompt, max_new_tokens=4, do_sample=False)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), prompt], dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, -1)
    again = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(again[:, 3:], made)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("peer", {"num_experts": 50}, "49 or 64"),
        ("peer", {"num_experts_per_tok": 8}, "at most 7"),
        ("peer", {"zero_compute_experts": ["zero"]}, "no zero-compute"),
        ("peer", {"options": {"query_norm": "batched"}}, "query_norm"),
        ("peer", {"options": {"grid_loss": "max"}}, "grid_loss"),
        ("peer", {"options": {"activation": "gel"}}, "such as gelu"),
        ("ultramem", {"options": {"cores": 3}}, "cores must divide value_width"),
        ("ultramem", {"options": {"expand": 5}}, "expand must divide num_experts"),
        ("ultramem", {"options": {"ranks": 0}}, "ranks and cores"),
        ("ultramem", {"options": {"layers_per_table": 0}}, "layers_per_table"),
    ],
)
def test_bad_options_say_what_was_expected(name, overrides, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        MoEForCausalLM(memory_config(tiny_config, name, **overrides))
