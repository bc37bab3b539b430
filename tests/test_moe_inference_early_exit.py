"""Early exit by the likeness of layers, step by step against a loop over layers."""

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache

from moe import MoEForCausalLM, early_exit
from moe.parts.attention import rotary_angles


@pytest.fixture
def model(tiny_config):
    return MoEForCausalLM(tiny_config(num_hidden_layers=5)).double().eval()


def decode(model, prompt_BS, num_tokens):
    with torch.no_grad():
        output = model(prompt_BS, use_cache=True)
        logits = [output.logits[:, -1]]
        for _ in range(num_tokens):
            token_B1 = logits[-1].argmax(-1, keepdim=True)
            output = model(token_B1, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[:, -1])
    return torch.stack(logits), output.past_key_values


def decode_by_loops(model, prompt_1S, num_tokens, threshold, least_layers):
    """One sequence; every layer's keys and values are written by hand."""
    config, exits = model.config, [0] * 5
    with torch.no_grad():
        output = model(prompt_1S, use_cache=True)
        cache, logits = output.past_key_values, [output.logits[:, -1]]
        for _ in range(num_tokens):
            x = model.model.embed_tokens(logits[-1].argmax(-1, keepdim=True))
            angles = rotary_angles(torch.tensor([[cache.get_seq_length()]]), config.head_dim, config.rope_theta)
            left = False
            for number, layer in enumerate(model.model.layers):
                normed = layer.input_layernorm(x)
                if left:
                    layer.self_attn.keys_values(normed, angles, cache)
                    continue
                h = x + layer.self_attn(normed, angles, None, cache)
                share = layer.mlp.router.weight @ layer.post_attention_layernorm(h)[0, 0]
                weight, expert = share.softmax(-1).topk(2)
                mlp = layer.mlp.experts(layer.post_attention_layernorm(h)[0], expert[None], weight[None])
                y = h + mlp[None]
                alike = cosine_similarity(x.float(), y.float(), dim=-1).item() >= threshold
                left = number + 1 >= least_layers and (alike or number == 4)
                exits[number] += left
                x = y
            logits.append(model.lm_head(model.model.norm(x))[:, -1])
    return torch.stack(logits), exits


def test_no_exit_above_every_cosine_is_the_model(model):
    prompt = torch.randint(96, (2, 5))
    expected, _ = decode(model, prompt, 6)
    with early_exit(model, threshold=1.1) as report:
        found, _ = decode(model, prompt, 6)
    assert torch.equal(found, expected)
    assert report.exits == [0, 0, 0, 0, 12]
    assert report.mean_layers == 5


def test_below_every_cosine_all_leave_after_the_least_layers_with_whole_caches(model):
    with early_exit(model, threshold=-1.1, least_layers=2) as report:
        _, cache = decode(model, torch.randint(96, (2, 5)), 6)
    assert report.exits == [0, 12, 0, 0, 0]
    assert isinstance(cache, DynamicCache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [11] * 5
    assert torch.equal(decode(model, torch.ones(1, 3).long(), 2)[0], decode(model, torch.ones(1, 3).long(), 2)[0])


@pytest.mark.parametrize("least_layers", [1, 3])
def test_steps_equal_a_loop_over_layers_and_batches_equal_singles(least_layers, model, tolerance):
    prompts = torch.randint(96, (3, 5))
    cosines = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, inputs, output: cosines.append(cosine_similarity(inputs[0], output[0], dim=-1).flatten())
        )
    decode(model, prompts, 1)
    threshold = float(torch.cat(cosines).median())
    singles = [decode_by_loops(model, row[None], 6, threshold, least_layers) for row in prompts]
    with early_exit(model, threshold=threshold, least_layers=least_layers) as report:
        found, _ = decode(model, prompts, 6)
    torch.testing.assert_close(found, torch.cat([logits for logits, _ in singles], 1), **tolerance[torch.float64])
    assert report.exits == [sum(counts) for counts in zip(*(exits for _, exits in singles), strict=True)]
    assert 0 < sum(report.exits[:4]) < 18, "some leave early and some do not"


def test_models_that_cannot_leave_are_refused_by_name(tiny_config):
    model = MoEForCausalLM(tiny_config(architecture="parallel_streams"))
    with pytest.raises(ValueError, match="'parallel_streams' has others"), early_exit(model, threshold=0.9):
        pass
    model = MoEForCausalLM(tiny_config(router="pregate"))
    with pytest.raises(ValueError, match="pre-gated"), early_exit(model, threshold=0.9):
        pass
    model = MoEForCausalLM(tiny_config())
    with (
        pytest.raises(ValueError, match=r"least_layers must lie in 1\.\.3"),
        early_exit(model, threshold=0.9, least_layers=4),
    ):
        pass
