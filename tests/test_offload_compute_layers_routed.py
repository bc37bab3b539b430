"""The chosen experts of a token in C: torch's choice and order, the same hits and evictions, and who turns it off."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import DynamicCache

import offload
from experiments.evidence.resident import load_resident
from offload.compute.kv_cache import grow_in_place
from offload.compute.layers import trial
from offload.compute.layers.choice import as_struct, choose, find_choice
from offload.compute.layers.operations import Questioned
from offload.compute.layers.routed_block import RouterProduct, find_router
from offload.compute.layers.routed_experts import ExpertAddresses, TokenExperts, combines_like_torch
from offload.compute.layers.rules import SIGMOID_FIRST, Rule
from offload.compute.linears import quicken_linears
from offload.compute.matvec import Matvecs
from offload.compute.orders import orders
from offload.native.kernel_matrix import plain_matrix
from offload.runtime.runtime import OffloadRuntime
from offload.store.packing import write_pack

LAYERS, EXPERTS, TOKENS = 2, 8, 24
SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GROUPS = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0}
LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "olmoe": {},
    "mixtral": {},
    "qwen3_moe": {"norm_topk_prob": True, "num_experts_per_tok": 3},
    "gpt_oss": {"num_experts_per_tok": 4},
    "qwen2_moe": {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 128},
    "deepseek_v3": {**GROUPS, **LATENT, "n_shared_experts": 2, "num_experts_per_tok": 3},
    "deepseek_v2": {**GROUPS, **LATENT, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
    "glm4_moe": {**GROUPS, "n_shared_experts": 1},
    "minimax_m2": {},
    "dots1": {**GROUPS, "n_shared_experts": 2},
    "hy_v3": {"num_shared_experts": 1, "mlp_layer_types": ["sparse"] * LAYERS},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS, "moe_k": 3, "moe_num_shared_experts": 1, "moe_layer_start_index": 0,
        "moe_layer_interval": 1,
    },
}  # fmt: skip
USUAL = ("qwen2_moe", "deepseek_v3")
WIDE = ("deepseek_v3", "deepseek_v2", "glm4_moe", "dots1", "hy_v3", "ernie4_5_moe")  # whose logits are float32
FUSED = FAMILIES.keys() - {"gpt_oss"}  # whose plain weights are stored transposed


@pytest.fixture(autouse=True)
def _compiler(several_threads):
    several_threads(1)
    try:
        orders()
    except OSError:
        pytest.skip("no C compiler")


def made(family, **more):
    config_class = transformers.CONFIG_MAPPING[family]
    known = config_class().to_dict().keys() | getattr(config_class, "attribute_map", {}).keys()
    sizes = {**SIZES, **FAMILIES.get(family, {}), **more}
    config = config_class(**{name: value for name, value in sizes.items() if name in known})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *(each for name, each in model.named_buffers() if name.endswith("bias"))):
        tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        made(family).save_pretrained(found[family])
    return found


def decoded(model, ids=None):
    """Logits of a prompt and of the tokens after it."""
    ids = torch.arange(TOKENS)[None] * 7 % 64 if ids is None else ids
    with torch.no_grad():
        output = model(ids[:, :3], use_cache=True)
        logits = [output.logits]
        for place in range(3, ids.shape[1]):
            output = model(ids[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def counted(monkeypatch, owner, name):
    """What calls of a method gave, from now on."""
    found, original = [], getattr(owner, name)

    def count(self, *arguments):
        found.append(original(self, *arguments))
        return found[-1]

    monkeypatch.setattr(owner, name, count)
    return found


def slow_unless(usual, names):
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


def questioned(family, **more):
    """A feed-forward of a family that our C may stand for, and its router."""
    model = made(family, **more)
    quicken_linears(model, Matvecs("fixed"))
    layer = model.model.layers[-1]
    block = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
    router, weight_ED = find_router(block)
    return Questioned(block, "experts", router, weight_ED), router


def sized(experts, top_k, **more):
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {**dict.fromkeys(names, experts), "num_experts_per_tok": top_k, "moe_k": top_k, **more}


CHOICES = {
    "olmoe": sized(64, 8, norm_topk_prob=False),
    "olmoe, normalised": sized(64, 8, norm_topk_prob=True),
    "mixtral": sized(8, 2),
    "gpt_oss": sized(32, 4),
    "deepseek_v3": sized(256, 8, n_group=8, topk_group=4, routed_scaling_factor=2.5),
    "deepseek_v2": sized(160, 6, n_group=8, topk_group=3, routed_scaling_factor=16.0),
    "deepseek_v2, greedy": sized(64, 6, topk_method="greedy"),
    "glm4_moe": sized(160, 8, n_group=1, topk_group=1),
    "minimax_m2": sized(256, 8),
    "hy_v3": sized(72, 8),
    "ernie4_5_moe": sized(64, 6),
    "granitemoe": sized(64, 8),
}
FEW_CHOICES = ("olmoe, normalised", "gpt_oss", "deepseek_v3", "hy_v3", "granitemoe")


@pytest.mark.parametrize("case", slow_unless(FEW_CHOICES, CHOICES))
def test_choices_are_those_of_the_router_ties_and_all(case):
    block, _ = questioned(case.partition(",")[0], **CHOICES[case])
    found = find_choice(block)
    assert found is not None, "torch chooses in another way on this processor"
    generator = torch.Generator().manual_seed(3)
    for row in range(60):
        logit_1E = torch.randn(1, block.num_experts, generator=generator) * 10.0 ** (row % 4 - 1)
        answer = block.answer(logit_1E.round() if row % 3 else logit_1E)
        found_1K, found_weight_1K = choose(found.how, answer.product.made)
        assert torch.equal(found_1K, answer.chosen[0])
        assert torch.equal(found_weight_1K, answer.chosen[1])


def test_a_choice_by_hand():
    """Two groups of two: the best is that of the largest sum, and the bias counts there alone."""
    rule = Rule(
        experts=4, rule=SIGMOID_FIRST, is_wide=True, chosen=1, groups=2, kept_groups=1, best_of_group=2, scale=2.0,
        is_unbiased=True,
    )  # fmt: skip
    bias_E = torch.tensor([0.0, 0.0, 0.5, 0.0])
    expert_1K, weight_1K = choose(as_struct(rule, 8, bias_E), torch.tensor([[3.0, -9.0, 0.0, 0.0]]))
    assert (expert_1K.tolist(), weight_1K.tolist()) == ([[2]], [[1.0]])  # 0.953 alone against 1.0 + 0.5
    assert choose(as_struct(rule, 8, None), torch.tensor([[3.0, 1.0, 0.0, 0.0]]))[0].tolist() == [[0]]


def test_what_is_left_to_torch():
    how = find_choice(questioned("olmoe")[0]).how
    assert choose(how, torch.full((1, EXPERTS), torch.nan).bfloat16()) is None
    assert choose(how, torch.full((1, EXPERTS), torch.inf).bfloat16()) is None
    for experts, top_k in ((128, 2), (32, 16)):
        assert find_choice(questioned("olmoe", **sized(experts, top_k))[0]) is None
    block, router = questioned("olmoe")
    forward = type(router).forward
    for change in (
        lambda logits, weight, expert: (logits, weight * 2, expert),
        lambda logits, weight, expert: (logits, weight, expert.flip(-1)),
        lambda logits, weight, expert: (logits, weight.double(), expert),
        lambda logits, weight, expert: (logits, weight),
    ):
        changed = type("Changed", (type(router),), {"forward": lambda self, x, of=change: of(*forward(self, x))})
        block._twin._modules["gate"].__class__ = changed
        assert find_choice(block) is None


def test_experts_of_a_token_are_added_in_torchs_order():
    for top_k, width in ((2, 64), (3, 96), (8, 2048)):
        for weight_type in (torch.bfloat16, torch.float32):
            assert combines_like_torch(top_k, width, weight_type, torch.get_num_threads())


def test_addresses_of_experts_come_and_go():
    found, matrices = ExpertAddresses(4), [torch.zeros(2, 2).bfloat16() for _ in range(3)]
    found.remove(1)
    found.put(0, {})  # an expert that our C does not read
    assert (found.first, found.known) == (None, set())
    up, gate, down = map(plain_matrix, matrices)
    for expert in (2, 3):
        found.put(expert, {"gate_up_proj": (gate, up), "down_proj": (down,)})
    first = found.first
    row = [found._address_EM[2, place] for place in (0, 8, 16)]
    assert row == [gate.codes, up.codes, down.codes]
    assert not found._address_EM[:2].any()
    found.remove(2)
    assert found.known == {3}
    assert not found._address_EM[2].any()
    found.clear()
    assert (found.known, found.first, found._address_EM.any()) == (set(), first, False)


@pytest.mark.parametrize("family", slow_unless(USUAL, FAMILIES))
def test_bits_are_the_same_in_memory_with_few_slots_and_by_the_modules(family, folders, monkeypatch):
    with monkeypatch.context() as patched:
        asked = counted(patched, RouterProduct, "by_torch")
        exact = offload.load(folders[family], cache_experts=4, arithmetic="exact")
        assert torch.equal(decoded(exact), decoded(load_resident(folders[family]).eval()))
    if exact.offload.report()["arithmetic"]["whole_blocks"]:  # not where torch's order of the shared expert is unknown
        assert asked or family not in WIDE
    found = []
    for cache_experts in (EXPERTS, 5, 3):
        with monkeypatch.context() as patched:
            if cache_experts == 3:
                patched.setattr(OffloadRuntime, "token_step", lambda *_: None)
                patched.setattr(trial, "find_routed_block", lambda *_, **__: None)
            done = counted(patched, TokenExperts, "__call__")
            whole = counted(patched, OffloadRuntime, "forward_token")
            with torch.inference_mode(cache_experts == 5):  # which changes what operations are called by
                model = offload.load(folders[family], cache_experts=cache_experts, arithmetic="fixed")
            found.append(decoded(model))
            assert any(done) == (cache_experts > 3 and family in FUSED)
            assert all(done[-LAYERS:]) or cache_experts < EXPERTS
            assert bool(whole) == (cache_experts > 3)
            assert model.offload.report()["arithmetic"]["whole_blocks"] == LAYERS * (cache_experts > 3)
            model.offload.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("policy", slow_unless({"lru"}, ["lru", "score", "eam"]))
def test_hits_evictions_and_traces_are_those_of_the_path_without_it(policy, folders, monkeypatch):
    ids, outcomes = torch.randint(0, 64, (1, 50), generator=torch.Generator().manual_seed(5)), []
    for is_quick in (True, False):
        with monkeypatch.context() as patched:
            if not is_quick:
                patched.setattr(OffloadRuntime, "token_step", lambda *_: None)
            done = counted(patched, TokenExperts, "__call__")
            model = offload.load(
                folders["olmoe"], cache_experts=5, policy=policy, arithmetic="fixed", record_trace=True
            )
            runtime = model.offload.runtime
            decoded(model, ids[:, :12])
            trace, runtime.recorder = model.offload.trace(), None
            logits = decoded(model, ids)
            outcomes.append({
                "ranks": [[slots.cache.rank(expert) for expert in range(EXPERTS)] for slots in runtime.layers],
                "resident": [sorted(slots.cache.resident) for slots in runtime.layers],
                "counters": [(layer.hits, layer.misses, layer.bytes_read) for layer in runtime.counters.layers],
                "trace": (trace.expert_TLK.tolist(), trace.weight_TLK.tolist()),
                "logits": logits.tolist(),
            })  # fmt: skip
            assert any(done) == is_quick
            assert not all(done) or not is_quick
            model.offload.close()
    assert outcomes[0] == outcomes[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compressed", "mxfp4"])
def test_stored_forms_are_computed_from_the_same_addresses(form, folders, tmp_path, monkeypatch):
    if form == "mxfp4":
        from tests.test_offload_formats_mxfp4 import make_folders

        folder, options = make_folders(tmp_path, width=64)[0], {}
    else:
        folder = folders["olmoe"]
        options = {"pack": write_pack(folder, tmp_path / "experts", is_compressed=True)}
    found = []
    for is_quick in (True, False):
        with monkeypatch.context() as patched:
            if not is_quick:
                patched.setattr(OffloadRuntime, "token_step", lambda *_: None)
            done = counted(patched, TokenExperts, "__call__")
            model = offload.load(folder, cache_experts=6, arithmetic="fixed", **options)
            found.append(decoded(model))
            assert any(done) == is_quick
            model.offload.close()
    assert torch.equal(*found)


def test_threads_that_decode_at_the_same_time_do_not_share_rooms(folders):
    model = offload.load(folders["olmoe"], cache_experts=EXPERTS, arithmetic="fixed")

    def hidden(seed):  # of the base model: hooks of the whole one follow one call at a time
        ids = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        cache, found = DynamicCache(config=model.config), []
        grow_in_place(cache)
        with torch.no_grad():
            for token in ids.T:
                found.append(model.model(token[None], past_key_values=cache, use_cache=True).last_hidden_state)
        return torch.cat(found)

    expected = [hidden(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(hidden, range(4)), expected))
    model.offload.close()


def test_known_addresses_are_those_of_experts_in_slots(folders):
    model = offload.load(folders["olmoe"], cache_experts=4, prefetch="transitions", arithmetic="fixed")
    runtime, rng = model.offload.runtime, random.Random(0)
    with torch.no_grad():
        past = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        for _ in range(40):
            model(torch.tensor([[rng.randrange(64)]]), past_key_values=past, use_cache=True)
            for slots in runtime.layers:
                known = slots.addresses.known
                assert known <= slots._resident.keys() - slots._ahead.keys() - slots._unproven
                for expert in range(EXPERTS):
                    there = slots._resident[expert].matrices.values() if expert in known else ()
                    parts = [part for pieces in there for matrix in pieces for part in matrix.parts]
                    assert not slots.addresses.example or slots.addresses._address_EM[expert].any() == bool(parts)
                    assert not parts or slots.addresses._address_EM[expert].tolist() == parts
    model.offload.close()
    assert not any(slots.addresses.known for slots in runtime.layers)


@pytest.mark.parametrize("family", slow_unless({"deepseek_v3"}, ["olmoe", "deepseek_v3", "qwen2_moe"]))
def test_listeners_and_replaced_modules_are_called(family, folders, monkeypatch):
    model = offload.load(folders[family], cache_experts=EXPERTS, arithmetic="fixed")
    expected, layer, seen = decoded(model), model.model.layers[0].mlp, []
    done = counted(monkeypatch, OffloadRuntime, "forward_token")
    modules = [layer, *(module for name, module in layer.named_modules() if name and not name.startswith("experts."))]
    is_whole = "forward" not in vars(layer)
    for module in modules:
        done.clear()
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(decoded(model), expected)
        handle.remove()
        assert len(done) == (LAYERS - (module is not layer or is_whole)) * (TOKENS - 3)
    assert len(seen) == len(modules) * (TOKENS - 2)
    layer.gate = copy.copy(layer.gate)
    done.clear()
    assert torch.equal(decoded(model), expected)
    assert len(done) == (LAYERS - 1) * (TOKENS - 3)
    assert torch.equal(decoded(copy.deepcopy(model)), expected)
    forward = vars(layer).get("forward")
    layer.forward = lambda x: torch.zeros_like(x)
    assert not torch.equal(decoded(model), expected)
    if forward is not None:
        layer.forward = forward
    model.offload.close()
    with pytest.raises(RuntimeError, match="closed"):
        decoded(model)


def test_exchanged_weights_gradients_and_numbers_that_are_none_go_to_the_modules(folders, monkeypatch):
    model = offload.load(folders["deepseek_v3"], cache_experts=EXPERTS, arithmetic="fixed")
    decoded(model)
    layer, done = model.model.layers[0].mlp, counted(monkeypatch, OffloadRuntime, "forward_token")
    asked = counted(monkeypatch, RouterProduct, "by_torch")
    own, x_11D = layer.forward.__self__._otherwise, torch.randn(1, 1, SIZES["hidden_size"]).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x_11D), own(x_11D))
        assert len(done) == 1
        layer.gate.e_score_correction_bias.mul_(-3)  # in place
        assert torch.equal(layer(x_11D), own(x_11D))
        assert len(done) == 2
        for x in (x_11D * torch.nan, torch.cat([x_11D, x_11D], dim=1)):
            torch.testing.assert_close(layer(x), own(x), rtol=0, atol=0, equal_nan=True)
        layer.shared_experts.down_proj.weight = torch.nn.Parameter(layer.shared_experts.down_proj.weight * 2)
        assert torch.equal(layer(x_11D), own(x_11D))
    assert len(done) == 2
    assert not asked
    model.offload.close()
