"""Parallel streams and routed heads: equations by loops with every gradient, identities, caches."""

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from moe import MoEForCausalLM
from routing import Carry, RoutingContext

HEADS = {"architecture": "routed_heads", "num_attention_heads": 8, "head_dim": 4}


def streams_model(tiny_config, streams, prefix, **more):
    options = {"streams": streams, "prefix": prefix, **more}
    return MoEForCausalLM(tiny_config(architecture="parallel_streams", architecture_options=options)).double().eval()


def with_the_weights_of(model, source):
    own = model.state_dict()
    own |= {name: value for name, value in source.state_dict().items() if ".stack." not in name}
    model.load_state_dict(own)
    return model


def test_one_stream_without_a_prefix_is_the_plain_model_bit_for_bit(tiny_config):
    one, plain = streams_model(tiny_config, 1, 0), MoEForCausalLM(tiny_config()).double().eval()
    with_the_weights_of(plain, one)
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(one(token_BS).logits, plain(token_BS).logits)


def test_equal_streams_are_the_plain_model(tiny_config, tolerance):
    many, plain = streams_model(tiny_config, 3, 0), MoEForCausalLM(tiny_config()).double().eval()
    with_the_weights_of(plain, many)
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(many(token_BS).logits, plain(token_BS).logits, **tolerance[torch.float64])


def test_streams_equal_single_streams_that_are_mixed_by_hand_with_every_gradient(tiny_config, tolerance):
    model, token_BS = streams_model(tiny_config, 2, 3, smoothing=0.2), torch.randint(96, (2, 6))
    ours = model(token_BS, use_cache=False).logits
    single = streams_model(tiny_config, 1, 3)
    x_P: list[torch.Tensor] = []
    single.model.norm.register_forward_pre_hook(lambda module, inputs: x_P.append(inputs[0]))
    for stream in range(2):
        parameters = {name: value for name, value in model.named_parameters() if ".stack." not in name}
        for name in ("prefix_keys", "prefix_values"):
            parameters[f"model.stack.{name}"] = getattr(model.model.stack, name)[:, stream : stream + 1]
        torch.func.functional_call(single, parameters, (token_BS,), {"use_cache": False})
    mixer = model.model.stack.mixer
    weight = mixer(torch.cat([rms_norm(x, (32,)) for x in x_P], -1)).softmax(-1) * 0.8 + 0.1
    expected = model.lm_head(model.model.norm(weight[..., :1] * x_P[0] + weight[..., 1:] * x_P[1]))
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    inputs, seed = list(model.parameters()), torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), inputs) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_streams_with_beams_padding_and_their_operations(tiny_config):
    model, prompt = streams_model(tiny_config, 2, 3), torch.randint(0, 96, (2, 7))
    padded, mask = torch.cat([torch.zeros(2, 4).long(), prompt], 1), (torch.arange(11) >= 4).long().expand(2, -1)
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        plain = model.generate(prompt, max_new_tokens=4, **settings)
        again = model.generate(padded, attention_mask=mask, max_new_tokens=4, **settings)
        assert torch.equal(again[:, 4:], plain)
    output = model(prompt)
    assert [one.tokens for one in output.passes] == [2, 2, 2]
    assert [stats.num_tokens for stats in output.router_stats] == [28, 28, 28]
    with pytest.raises(ValueError, match="take another router"):
        MoEForCausalLM(tiny_config(architecture="parallel_streams", router="remoe"))


@pytest.mark.parametrize("router", ["remoe", "olmoe"])
def test_routed_heads_equal_loops_over_heads_with_every_gradient(router, tiny_config, tolerance):
    config = tiny_config(**HEADS, router=router, architecture_options={"shared_heads": 2}, num_key_value_heads=4)
    layer = MoEForCausalLM(config).double().eval().model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    x_BSD = torch.randn(1, 5, 32).double().requires_grad_()
    x_TD, context = x_BSD[0], RoutingContext()
    routing, _, _ = mlp.router(x_TD, Carry(), context)
    cos, sin = torch.ones(1, 1, 5, 4).double(), torch.zeros(1, 1, 5, 4).double()
    from moe.layers.stack import StackInputs

    inputs = StackInputs(angles=(cos, sin), mask=None, cache=None, context=context)
    ours = attention.attend(x_BSD, mlp.weights(x_TD, routing), inputs)[0]
    score = x_TD @ mlp.router.weight.T
    if router == "remoe":
        weight_TE = score.relu()
    else:
        share = score.softmax(-1)
        kept = torch.zeros_like(share).scatter(1, share.topk(2).indices, 1.0)
        weight_TE = share * kept
    kind, shared = (x_TD @ mlp.kind_gate.T).softmax(-1), (x_TD @ mlp.shared_gate.T).softmax(-1)
    heads = []
    for head in range(8):
        rows, pair = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        query = attention.q_norm(x_TD @ attention.q_proj.weight[rows].T)
        key = attention.k_norm(x_TD @ attention.k_proj.weight[pair].T)
        value = x_TD @ attention.v_proj.weight[pair].T
        made = scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
        gate = kind[:, 0] * shared[:, head] if head < 2 else kind[:, 1] * weight_TE[:, head - 2]
        heads.append(gate[:, None] * made @ attention.o_proj.weight[:, rows].T)
    expected = torch.stack(heads).sum(0)
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    parameters, seed = (
        [x_BSD, mlp.kind_gate, mlp.shared_gate, mlp.router.weight, *attention.parameters()],
        torch.randn(5, 32),
    )
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), parameters) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_heads_that_all_weigh_one_are_the_dense_model(tiny_config, tolerance):
    options = {"router": "forced", "router_options": {"num_rows": 9}, "num_experts": 8, "num_experts_per_tok": 8}
    model = MoEForCausalLM(tiny_config(**HEADS, **options)).double().eval()
    for router in model.model.routers:
        router.replay(torch.arange(8).expand(9, 8), torch.ones(9, 8))
    dense = (
        MoEForCausalLM(
            tiny_config(
                architecture="mixture_of_recursions",
                architecture_options={
                    "choice": "none",
                    "recursions": 1,
                    "feed_forward": "dense",
                    "first": 1,
                    "last": 1,
                },
                num_attention_heads=8,
                head_dim=4,
            )
        )
        .double()
        .eval()
    )
    weights = {name.replace("mlp.feed_forward", "mlp"): value for name, value in model.state_dict().items()}
    dense.load_state_dict({name: weights[name] for name in dense.state_dict()})
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(token_BS).logits, dense(token_BS).logits, **tolerance[torch.float64])


def test_routed_heads_that_do_not_add_up_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"must add up to num_attention_heads \(8\)"):
        MoEForCausalLM(tiny_config(**HEADS, architecture_options={"shared_heads": 1}))
