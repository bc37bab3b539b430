"""Decoder layers of single tokens in C: the bits of their modules, growing caches, and who keeps them."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from offload.compute.attention import quicken_attention
from offload.compute.kv_cache import grow_in_place
from offload.compute.layers import token_layer
from offload.compute.layers.attending import attends_like_torch
from offload.compute.layers.structs import Heads
from offload.compute.layers.token_layer import PreparedLayer, TokenLayer
from offload.compute.layers.trial import quicken_layers
from offload.compute.linears import quicken_linears
from offload.compute.matvec import Matvecs
from offload.compute.norms import quicken_norms
from offload.compute.orders import orders
from offload.compute.resident import store_linears
from offload.formats.compression import CompressedMatrix
from offload.formats.resident.linears import count_stored
from offload.native.library import FORBIDDING

LAYERS, PROMPT, STEPS = 2, 5, 8
SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": LAYERS,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mixtral": {},
    "mixtral, window": {"sliding_window": 8},
    "olmoe": {"num_attention_heads": 2},
    "qwen2_moe": {"decoder_sparse_step": 1, "num_attention_heads": 2},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 8},
    "glm4_moe": {"use_qk_norm": True},  # which rotates half of a head's columns
    "minimax_m2": {},
    "dots1": {"n_shared_experts": 1},
    "hy_v3": {},
    "exaone_moe": {"sliding_window": 8},
    "solar_open": {},
}
USUAL = ("mixtral, window", "gpt_oss", "glm4_moe")
# scaled sums, further norms, a branch beside attention
OTHERS = {"granitemoe": {"residual_multiplier": 0.5}, "gemma2": {}, "gpt_neox": {}}


@pytest.fixture(autouse=True)
def _compiler():
    try:
        orders()
    except OSError:
        pytest.skip("no C compiler")


def make(family, more=()):
    config_class = transformers.CONFIG_MAPPING[family.partition(",")[0]]
    known = config_class().to_dict().keys() | getattr(config_class, "attribute_map", {}).keys()
    sizes = {**SIZES, **dict(more)}
    config = config_class(**{name: value for name, value in sizes.items() if name in known})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)  # biases, sinks and norms are constants at first
    return model


def quickened(model, arithmetic="fixed"):
    """A copy whose modules are quickened one by one, and another whose layers are, too."""
    found = []
    for is_whole in (False, True):
        matvecs, copied = Matvecs(arithmetic), copy.deepcopy(model)
        quicken_linears(copied, matvecs)
        quicken_norms(copied)
        quicken_attention(copied)
        found.append(copied)
        count = quicken_layers(copied, matvecs).whole_layers if is_whole else 0
    return (*found, count)


def decoded(model, steps=STEPS, cache=None):
    """Logits of a prompt and of single tokens after it, and the cache in the end."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    grow_in_place(cache)
    ids = torch.arange(PROMPT + steps)[None] * 7 % 64
    with torch.no_grad():
        logits = [model(ids[:, :PROMPT], past_key_values=cache, use_cache=True).logits]
        for place in range(PROMPT, PROMPT + steps):
            logits.append(model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
    return logits, cache


def calls(monkeypatch):
    """How often layers were computed by C, from now on."""
    counted, original = [], PreparedLayer.__call__

    def count(self, token):
        counted.append(self)
        return original(self, token)

    monkeypatch.setattr(PreparedLayer, "__call__", count)
    return counted


def assert_same(found, expected):
    (logits, cache), (expected_logits, expected_cache) = found, expected
    assert all(map(torch.equal, logits, expected_logits))
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def slow_unless(usual, names):
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("family", slow_unless(USUAL, FAMILIES))
def test_bits_are_those_of_the_modules_while_the_cache_grows(family, several_threads, monkeypatch):
    several_threads(1)
    model = make(family, FAMILIES[family])
    modules, whole, count = quickened(model)
    assert count == LAYERS
    counted = calls(monkeypatch)
    found = decoded(whole)
    assert len(counted) == LAYERS * STEPS
    assert_same(found, decoded(modules))
    assert_same(decoded(quickened(model, "exact")[1]), decoded(model))


def test_layers_attend_in_c_unless_another_kernel_of_torch_is_asked_for(several_threads, monkeypatch):
    several_threads(1)
    if not attends_like_torch(Heads(4, 2, 32), 32**-0.5):
        pytest.skip("torch's order is not known on this processor")
    called, original = [], token_layer.whole_attention()
    monkeypatch.setattr(token_layer, "whole_attention", lambda: lambda *given: called.append(1) or original(*given))
    modules, whole, _ = quickened(make("mixtral"))
    called.clear()
    assert_same(decoded(whole, 40), decoded(modules, 40))
    assert len(called) == 2 * 40
    called.clear()
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(decoded(whole), decoded(modules))
    assert not called


def test_two_threads_are_tried_by_themselves_and_give_the_same_bits(several_threads, monkeypatch):
    several_threads(1)
    _, whole, _ = quickened(make("qwen3_moe"))
    expected = decoded(whole)
    several_threads(2)
    counted = calls(monkeypatch)
    assert_same(decoded(whole), expected)
    assert len({id(prepared) for prepared in counted}) > LAYERS  # those of the trial, and the layers
    assert len(whole.model.layers[0].forward.__self__._prepared) == 2


@pytest.mark.parametrize("family", slow_unless({"granitemoe"}, OTHERS))
def test_layers_of_another_form_keep_their_modules(family):
    model = make(family, {"head_dim": 16, **OTHERS[family]})
    assert quickened(model)[2] == 0


def test_a_cut_cache_and_a_copied_one_go_on_with_the_same_bits():
    modules, whole, _ = quickened(make("mixtral"))
    caches = []
    for model in (modules, whole):
        _, cache = decoded(model)
        cache.crop(-4)
        kept = copy.deepcopy(cache)
        first, second = decoded(model, 3, cache), decoded(model, 3, kept)
        assert_same(first, second)
        caches.append(first)
    assert_same(caches[1], caches[0])


def test_what_is_no_single_token_with_our_cache_goes_to_the_modules(monkeypatch):
    modules, whole, _ = quickened(make("qwen3_moe"))
    counted = calls(monkeypatch)
    one, two = torch.tensor([[3]]), torch.tensor([[3], [4]])
    with torch.no_grad():
        for ids, options in (
            (one, {"use_cache": False}),
            (one, {"past_key_values": DynamicCache(config=whole.config)}),  # not one that grows in place
            (two, {}),
            (one, {"output_hidden_states": True, "output_router_logits": True}),
        ):
            expected = modules(ids, **copy.deepcopy(options))
            assert torch.equal(whole(ids, **copy.deepcopy(options)).logits, expected.logits)
    assert not counted


def test_router_logits_and_attentions_are_recorded_by_the_modules(monkeypatch):
    modules, whole, _ = quickened(make("qwen3_moe"))
    caches = [decoded(model)[1] for model in (modules, whole)]
    counted = calls(monkeypatch)
    with torch.no_grad():
        expected, found = (
            model(torch.tensor([[3]]), past_key_values=cache, output_router_logits=True, output_attentions=True)
            for model, cache in zip((modules, whole), caches, strict=True)
        )
    assert all(map(torch.equal, found.router_logits, expected.router_logits))
    assert len(found.attentions) == len(expected.attentions)
    assert not counted


def test_hooks_exchanged_modules_and_gradients_end_it(monkeypatch):
    modules, whole, _ = quickened(make("llama"))
    counted = calls(monkeypatch)
    layer, seen = whole.model.layers[0], []
    handle = layer.self_attn.q_proj.register_forward_hook(lambda *args: seen.append(args))
    decoded(whole, 2)
    assert (len(counted), len(seen)) == ((LAYERS - 1) * 2, 3)
    handle.remove()
    assert_same(decoded(whole), decoded(modules))
    for model in (modules, whole):
        model.model.layers[1].self_attn.k_proj.weight.data = model.model.layers[0].self_attn.k_proj.weight.data * 2
    counted.clear()
    assert_same(decoded(whole, 2), decoded(modules, 2))
    assert len(counted) == 2  # of the other layer
    counted.clear()
    model = whole.requires_grad_(True)
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[1, 2]]), past_key_values=cache)
    assert model(torch.tensor([[3]]), past_key_values=cache).logits.requires_grad
    assert not counted


def test_compressed_linear_layers_are_multiplied_from_what_is_stored():
    model = make("mixtral")
    store_linears(model, CompressedMatrix())
    assert count_stored(model)
    modules, whole, count = quickened(model)
    assert count == LAYERS
    assert_same(decoded(whole), decoded(modules))


def test_a_copied_model_reads_its_own_weights():
    _, whole, _ = quickened(make("llama"))
    expected = decoded(whole)
    copied = copy.deepcopy(whole)
    for parameter in whole.parameters():
        parameter.zero_()
    assert isinstance(copied.model.layers[0].forward.__self__, TokenLayer)
    assert copied.model.layers[0].forward.__self__ is not whole.model.layers[0].forward.__self__
    assert_same(decoded(copied), expected)


@pytest.mark.slow  # the C is compiled anew for each
@pytest.mark.parametrize("forbidden", ["amx", "amx,avx512_bf16,avx512_vbmi", "amx,avx512_bf16,avx512,avx2"])
def test_bits_are_those_of_the_modules_without_some_instruction_sets(forbidden):
    environment = os.environ | {FORBIDDING: forbidden, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "while_the_cache_grows",
        "-m",
        "",
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(FAMILIES)} passed" in done.stdout
