"""What the hooks of an offloaded model note about its calls."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

import offload
from offload.ram.counters import AheadCounters, total_ahead


def test_counts_of_layers_add_up():
    layers = [AheadCounters(issued=5, useful=3, late=1, wasted=1, bytes_read=7), AheadCounters(issued=2, useful=2)]
    assert total_ahead(layers) == AheadCounters(issued=7, useful=5, late=1, wasted=1, bytes_read=7)
    assert total_ahead([]) == AheadCounters()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = offload.load(folder, record_trace=True)
    yield model
    model.offload.close()


def test_a_trace_says_which_decoder_layers_it_is_of(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 2])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = offload.load(tmp_path, cache_experts=2, record_trace=True)
    with torch.no_grad():
        model(torch.arange(5)[None])
    trace = model.offload.trace()
    model.offload.close()
    assert (trace.layer_ids, trace.metadata["hidden_layers"], trace.num_layers) == ((1, 3), 4, 2)


def steps(model):
    counters = model.offload._runtime.counters
    assert all(seconds > 0 for seconds, _ in counters.last_calls)
    return [tokens for _, tokens in counters.last_calls]


def test_threads_call_one_model_at_the_same_time(tmp_path):
    """Their calls overlap as they like: each waits for the others before its first layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, meeting = offload.load(tmp_path, cache_experts=2), threading.Barrier(4, timeout=30)
    prompts = [torch.arange(length)[None] for length in (5, 13, 6, 9)]

    def logits(prompt):
        with torch.no_grad():
            return model(prompt).logits

    expected = [logits(prompt) for prompt in prompts]

    def meet(*_):
        meeting.wait()

    waits = model.model.embed_tokens.register_forward_hook(meet)
    model.offload.reset()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(logits, prompts))
    waits.remove()
    assert all(map(torch.equal, found, expected))
    assert sorted(steps(model)) == [5, 6, 9, 13]
    model.offload.close()


def test_tokens_of_a_call_are_counted_however_they_are_given(model):
    model.offload.reset()
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        model(tokens)
        model(input_ids=tokens[:, :3])
        model(inputs_embeds=model.get_input_embeddings()(tokens[:, :2]))
        model(input_ids=None, inputs_embeds=model.get_input_embeddings()(tokens[:, :4]))
    assert steps(model) == [5, 3, 2, 4]
    assert model.offload.report()["steps"] == 4


def test_a_call_that_fails_is_neither_counted_nor_recorded(model):
    model.offload.reset()
    before = len(model.offload.trace().sequence_T)

    def fail(module, args, output):
        raise RuntimeError("no more")

    hook = model.lm_head.register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no more"):
        model(torch.arange(6)[None])
    hook.remove()
    with torch.no_grad():
        model(torch.arange(3)[None])
    assert steps(model) == [3]
    assert len(model.offload.trace().sequence_T) == before + 3
