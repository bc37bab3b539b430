import pytest
import torch
from torch.nn.functional import silu
from transformers import DynamicCache, StaticCache

import offload
from experiments.evidence.resident import load_resident
from moe import MoEForCausalLM

SETTINGS = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def readme_config(tiny_config, top_k=1, **options):
    widths = {"expert_widths": [16, 8, 24], "permanent_widths": [8, 16, 0]}
    return tiny_config(
        architecture="readme",
        architecture_options={"router_width": 16, "router_heads": 2, "router_ffn": 12} | widths | options,
        num_experts_per_tok=top_k,
    )


def build(tiny_config, **options):
    return MoEForCausalLM(readme_config(tiny_config, **options)).eval()


def rms(x, norm):
    return x / (x.square().mean() + 1e-5).sqrt() * norm.weight


def rotated(x, position):
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        # angles are float32 in the model, whatever its dtype
        angle = torch.tensor(float(position)) * 10_000.0 ** (-torch.tensor(2.0 * i) / len(x))
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def feed_forward(x, mlp):
    return mlp.down_proj.weight @ (silu(mlp.gate_proj.weight @ x) * (mlp.up_proj.weight @ x))


def router_loop(core, token_S):
    """The router's logits, one position, one head and one key at a time."""
    block, heads = core.blocks[0], 2
    attention = block.self_attn
    x = [core.embed_tokens.weight[token] for token in token_S]
    normed = [rms(v, block.input_layernorm) for v in x]
    rows = []
    for s in range(len(x)):
        mixed = []
        for head in range(heads):
            part = slice(head * 8, head * 8 + 8)
            query = rotated((attention.q_proj.weight @ normed[s])[part], s)
            scores = torch.stack(
                [query @ rotated((attention.k_proj.weight @ normed[j])[part], j) / 8**0.5 for j in range(s + 1)]
            ).softmax(dim=0)
            values = [(attention.v_proj.weight @ normed[j])[part] for j in range(s + 1)]
            mixed.append(sum(score * value for score, value in zip(scores, values, strict=True)))
        y = x[s] + attention.o_proj.weight @ torch.cat(mixed)
        y = y + feed_forward(rms(y, block.post_attention_layernorm), block.mlp)
        rows.append(core.head.weight @ rms(y, core.norm))
    return torch.stack(rows)


def core_of(model):
    return model.model.moe_layers[0].router.core


def test_router_equals_a_plain_loop_with_every_gradient(tiny_config, tolerance):
    model = build(tiny_config, weigh="probability").double()
    core, token_S = core_of(model), [3, 9, 9, 40, 7]
    seen = []
    core.register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(torch.tensor([token_S]))
    theirs = router_loop(core, token_S)
    torch.testing.assert_close(seen[0], theirs, **tolerance[torch.float64])
    upstream = torch.randn_like(theirs)
    leaves = list(core.parameters())
    for got, want in zip(
        torch.autograd.grad(seen[0], leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, **tolerance[torch.float64])


@pytest.mark.parametrize("weigh", ["one", "probability"])
def test_layer_equals_a_plain_loop_with_every_gradient(tiny_config, tolerance, weigh):
    model = build(tiny_config, weigh=weigh).double()
    layer, inputs, outputs = model.model.moe_layers[0], [], []
    layer.register_forward_hook(lambda _m, i, o: inputs.append(i) or outputs.append(o[0]))
    model(torch.randint(96, (2, 5)))
    (x_TD, carry, _), y_TD = inputs[0], outputs[0]
    probability_TE = carry.get("token_router_logits").softmax(-1)
    rows = []
    for x_D, probability_E in zip(x_TD, probability_TE, strict=True):
        expert = int(probability_E.argmax())
        gate, up = layer.experts.gate_up_proj[expert].chunk(2)
        y_D = layer.experts.down_proj[expert] @ (silu(gate @ x_D) * (up @ x_D))
        y_D = y_D if weigh == "one" else probability_E[expert] * y_D
        rows.append(y_D + feed_forward(x_D, layer.permanent))
    theirs = torch.stack(rows)
    torch.testing.assert_close(y_TD, theirs, **tolerance[torch.float64])
    leaves = [x_TD, *layer.experts.parameters(), *layer.permanent.parameters()]
    upstream = torch.randn_like(theirs)
    ours = torch.autograd.grad(y_TD, leaves, upstream, retain_graph=True)
    for got, want in zip(ours, torch.autograd.grad(theirs, leaves, upstream), strict=True):
        torch.testing.assert_close(got, want, **tolerance[torch.float64])


def test_every_layer_uses_the_one_plan(tiny_config):
    stats = build(tiny_config)(torch.randint(96, (2, 7))).router_stats
    assert len(stats) == 3
    assert all(torch.equal(layer.kept.expert_TK, stats[0].kept.expert_TK) for layer in stats)


def test_trap_the_language_model_loss_never_trains_the_router(tiny_config):
    token_BS = torch.randint(96, (2, 7))
    for weigh, is_trained in (("one", False), ("probability", True)):
        model = build(tiny_config, weigh=weigh)
        model(token_BS, labels=token_BS).lm_loss.backward()
        gradients = [p.grad for p in core_of(model).parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients) == is_trained


def test_trap_incremental_decoding_is_exact(tiny_config):
    """The released fast path concatenates uninitialised keys and values."""
    model = build(tiny_config)
    token_BS = torch.randint(96, (2, 5))
    made = model.generate(token_BS, **SETTINGS)
    full = model(made.sequences)
    for step, logits in enumerate(made.logits):
        torch.testing.assert_close(logits, full.logits[:, 4 + step], atol=1e-5, rtol=1e-4)
    seen = []
    core_of(model).register_forward_hook(lambda _m, _i, output: seen.append(output.view(2, -1, 6)))
    model.generate(token_BS, **SETTINGS)
    decoded = torch.cat(seen, dim=1)
    model(made.sequences[:, :-1])
    torch.testing.assert_close(decoded, seen[-1], atol=1e-5, rtol=1e-4)


def test_trap_attention_is_scaled_by_the_root_of_the_width(tiny_config):
    """The released router divides by 1; `router_loop` divides by sqrt(8) and agrees."""
    core = core_of(build(tiny_config))
    assert core.blocks[0].self_attn.head_dim == 8


def test_trap_current_token_is_routed_by_itself(tiny_config):
    """Equation 4 writes x_{t+1}; the released code, and this, see ids up to the current one."""
    model = build(tiny_config).double()
    token_S = torch.tensor([[5, 6, 7, 8]])
    changed = torch.tensor([[5, 6, 9, 8]])
    seen = []
    core_of(model).register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(token_S), model(changed)
    assert torch.equal(seen[0][:2], seen[1][:2])
    assert not torch.equal(seen[0][2], seen[1][2])


def test_left_padding_changes_nothing(tiny_config):
    model = build(tiny_config)
    token_S = torch.randint(96, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), token_S], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, 3:], model(token_S).logits, atol=1e-5, rtol=1e-4
    )
    made = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(made[:, 9:], model.generate(token_S, max_new_tokens=4, do_sample=False)[:, 6:])


def test_beam_search_reorders_the_routers_cache_too(tiny_config):
    model = build(tiny_config)
    token_BS = torch.randint(96, (1, 4))
    with_cache = model.generate(token_BS, num_beams=3, max_new_tokens=6, do_sample=False)
    without = model.generate(token_BS, num_beams=3, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("slots", [1, 3, 6])
def test_offloaded_logits_are_the_resident_bits(tiny_config, tmp_path, slots):
    build(tiny_config).save_pretrained(tmp_path)
    resident = load_resident(tmp_path, experts_implementation="grouped_mm")
    loaded = offload.load(tmp_path, cache_experts=slots)
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(token_BS).logits, resident(token_BS).logits)
    assert torch.equal(
        loaded.generate(token_BS, **SETTINGS).sequences, resident.generate(token_BS, **SETTINGS).sequences
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"top_k": 2}, "num_experts_per_tok must be 1"),
        ({"weigh": "both"}, "weigh must be one of"),
        ({"router_width": 18}, "multiple of twice router_heads"),
        ({"expert_widths": [8, 8]}, "one per MoE layer"),
        ({"expert_widths": [8, 0, 8]}, "at least 1"),
        ({"router_wdth": 16}, "did you mean 'router_width'"),
    ],
)
def test_bad_options_are_refused(tiny_config, options, reason):
    with pytest.raises(ValueError, match=reason):
        build(tiny_config, **options)


def test_inputs_without_ids_and_caches_without_room_are_refused(tiny_config):
    model = build(tiny_config)
    with pytest.raises(ValueError, match="routes by token ids"):
        model(inputs_embeds=torch.randn(1, 3, 32))
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="default \\(dynamic\\) cache"):
        model(torch.randint(96, (1, 3)), past_key_values=cache, use_cache=True)
    cache = DynamicCache(config=model.config)
    model(torch.randint(96, (1, 3)), past_key_values=cache, use_cache=True)
    assert len(cache.layers) == 4
