"""Skipping feed-forwards while decoding: against a loop over layers, keys and values intact, several families."""

from statistics import median

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from moe import MoEForCausalLM, skip_feed_forward

LAYERS = 6
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EVERYTHING = {"threshold": -1.0, "cold_head": 1, "cold_tail": 2, "warm_up": 2}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


FAMILIES = {
    "llama": llama,
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_layer=LAYERS,
            n_head=4,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    ),
}


@pytest.fixture(params=[*FAMILIES, "ours"])
def model(request, tiny_config):
    if request.param == "ours":
        built = MoEForCausalLM(tiny_config(num_hidden_layers=LAYERS, num_dense_layers=2))
    else:
        built = FAMILIES[request.param]()
    if request.param == "mixtral":  # grouped products know no float64
        built.set_experts_implementation("eager")
    return built.double().eval()


def generate(model, prompt, new=8):
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )


def test_above_every_cosine_nothing_changes(model):
    prompt = torch.randint(0, 96, (2, 5))
    plain = generate(model, prompt)
    with skip_feed_forward(model, threshold=1.1, warm_up=0) as report:
        made = generate(model, prompt)
    assert torch.equal(made.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(made.logits, plain.logits, strict=True))
    assert report.skipped_share == 0
    assert report.tokens == 2 * 7
    again = generate(model, prompt)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True)), "nothing is left behind"


def test_below_every_cosine_the_warm_layers_but_the_first_are_skipped_and_keys_stay_whole(model):
    prompt = torch.randint(0, 96, (2, 5))
    with skip_feed_forward(model, **EVERYTHING) as report:
        made = generate(model, prompt)
    decoded = 2 * 7  # the first new token comes with the prompt
    assert report.tokens == decoded
    assert report.skipped == [0, 0, decoded - 2 * 2, decoded - 2 * 2, 0, 0]
    cache = made.past_key_values
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [12] * LAYERS


def one_token_by_loops(model, token, cache, warm_layers, threshold, is_warm):
    """One decoding step of a Llama, layer by layer."""
    x = model.model.embed_tokens(token)
    position = torch.tensor([[cache.get_seq_length()]])
    angles, skipping, skipped, cosines = model.model.rotary_emb(x, position), False, [], []
    for index, layer in enumerate(model.model.layers):
        y, _ = layer.self_attn(
            layer.input_layernorm(x), position_embeddings=angles, attention_mask=None, past_key_values=cache
        )
        x = x + y
        if is_warm and index in warm_layers and skipping:
            skipped.append(index)
            continue
        after = x + layer.mlp(layer.post_attention_layernorm(x))
        cosines.append(float(cosine_similarity(x, after, dim=-1)))
        if is_warm and index in warm_layers and cosines[-1] >= threshold:
            skipping = True
        x = after
    return model.lm_head(model.model.norm(x)), skipped, cosines


@torch.no_grad()
def test_equals_a_loop_over_layers():
    model = llama().double().eval()
    tokens = torch.randint(0, 96, (1, 14))
    first, cache, ours = (DynamicCache(config=model.config) for _ in range(3))
    for own in (first, cache):
        model(tokens[:, :4], past_key_values=own)
    steps = [one_token_by_loops(model, tokens[:, t : t + 1], first, range(1, 5), 2.0, True) for t in range(4, 14)]
    threshold = median(cosine for _, _, cosines in steps for cosine in cosines[1:5])
    counted, partly = [0] * LAYERS, 0
    with skip_feed_forward(model, threshold=threshold, cold_head=1, cold_tail=1, warm_up=3) as report:
        model(tokens[:, :4], past_key_values=ours)
        logits = [model(tokens[:, t : t + 1], past_key_values=ours).logits for t in range(4, 14)]
    for step, t in enumerate(range(4, 14)):
        token = tokens[:, t : t + 1]
        expected, skipped, _ = one_token_by_loops(model, token, cache, range(1, 5), threshold, is_warm=step >= 3)
        torch.testing.assert_close(logits[step], expected)
        for index in skipped:
            counted[index] += 1
        partly += 0 < len(skipped) < 3
    assert report.skipped == counted
    assert partly, "the case must not be all or nothing"


@torch.no_grad()
def test_sequences_of_a_batch_skip_on_their_own(model):
    prompt = torch.randint(0, 96, (4, 5))
    settings = {"threshold": 0.8, "cold_head": 1, "cold_tail": 1, "warm_up": 0}
    with skip_feed_forward(model, **settings) as together:
        batch = generate(model, prompt, new=5)
    alone_skips = [0] * LAYERS
    for row in range(4):
        with skip_feed_forward(model, **settings) as report:
            alone = generate(model, prompt[row : row + 1], new=5)
        alone_skips = [a + b for a, b in zip(alone_skips, report.skipped, strict=True)]
        for a, b in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0])
    assert together.skipped == alone_skips


def test_every_request_warms_up_again():
    model = llama().eval()
    with skip_feed_forward(model, **EVERYTHING) as report:
        for length in (5, 1, 1):
            generate(model, torch.randint(0, 96, (1, length)), new=4)
    assert report.tokens == 3 * 3
    assert report.skipped[2] == 3 * (3 - 2)


def test_bad_settings_say_what_was_expected(tiny_config):
    model = llama()
    for settings, message in (
        ({"cold_head": 3, "cold_tail": 3}, "at least one of 6 layers"),
        ({"cold_head": -1}, "cold_head"),
        ({"warm_up": -1}, "warm_up"),
    ):
        with pytest.raises(ValueError, match=message), skip_feed_forward(model, threshold=0.9, **settings):
            pass
    with pytest.raises(ValueError, match="no list of decoder layers"), skip_feed_forward(model.lm_head, threshold=0.9):
        pass
    pregated = MoEForCausalLM(tiny_config(router="pregate"))
    with pytest.raises(ValueError, match="pre-gated"), skip_feed_forward(pregated, threshold=0.9):
        pass
