"""Offloaded models against transformers' resident ones: bits, tokens, faults, traces."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

import offload
from experiments.evidence.resident import load_resident
from offload.prefetch.predictor import TrainedPredictor
from routing.traces import EMPTY

SHARED = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
QWEN = {**SHARED, "intermediate_size": 48, "head_dim": 8}
CONFIGS = {
    "olmoe": lambda: OlmoeConfig(**SHARED, intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "mixtral": lambda: MixtralConfig(**SHARED, intermediate_size=40, num_local_experts=6, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**QWEN, moe_intermediate_size=40, num_experts=8, num_experts_per_tok=4),
    "odd": lambda: Qwen3MoeConfig(**QWEN, moe_intermediate_size=21, num_experts=7, num_experts_per_tok=3),
    "one_expert": lambda: MixtralConfig(**SHARED, intermediate_size=24, num_local_experts=1, num_experts_per_tok=1),
    "all_experts": lambda: OlmoeConfig(**SHARED, intermediate_size=24, num_experts=4, num_experts_per_tok=4),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and resident model of a configuration, made once."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = {}

    def make(name, dtype=torch.float32):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
            model.save_pretrained(folder, max_shard_size="100KB")
            implementation = "eager" if name == "odd" else None
            resident = load_resident(folder, experts_implementation=implementation)
            made[name, dtype] = (folder, resident.eval())
        return made[name, dtype]

    return make


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokens():
    return torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(1))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# each pair of model and dtype, of model and io, of dtype and io
PAIRS = [
    (name, dtype, ("cached", "direct")[(row + column) % 2])
    for row, name in enumerate(sorted(CONFIGS))
    for column, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("name", "dtype", "io"), PAIRS)
def test_bits_and_tokens_equal_the_resident_model_at_every_cache_size(saved, tokens, name, dtype, io):
    folder, resident = saved(name, dtype)
    with torch.no_grad():
        expected = resident(tokens).logits
    expected_ids = resident.generate(tokens, max_new_tokens=8, do_sample=False)
    for cache_experts in (1, 5) if io == "cached" else (2, 8):
        model = offload.load(folder, cache_experts=cache_experts, io=io)
        assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), expected_ids)
        model.offload.close()


def test_fast_arithmetic_is_the_same_at_every_cache_size_and_close_to_exact(saved):
    folder, resident = saved("qwen3_moe", torch.bfloat16)
    tokens = torch.arange(3, 15)[None]
    outputs = []
    for cache_experts in (1, 3, 8):
        model = offload.load(folder, cache_experts=cache_experts, arithmetic="fast")
        past = model(tokens[:, :4], use_cache=True).past_key_values
        steps = [model(tokens[:, t : t + 1], past_key_values=past, use_cache=True).logits for t in range(4, 12)]
        outputs.append(torch.cat(steps, dim=1))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    with torch.no_grad():
        exact = resident(tokens).logits[:, 4:]
    assert (outputs[0] - exact).abs().max() < 0.05 * exact.abs().max()


def save_random_predictor(config, path):
    """One that guesses about half of the experts at random, so that reads are given up all the time."""
    L, E = config.num_hidden_layers, getattr(config, "num_experts", None) or config.num_local_experts
    rng = np.random.default_rng(0)
    weight_ALVE = rng.normal(size=(2, L, 3 * E, E)).astype(np.float32)
    TrainedPredictor(weight_ALVE, np.zeros((2, L, E), np.float32)).save(path)


@pytest.mark.parametrize("prefetch", ["gate", "transitions", "trained"])
@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_reading_ahead_changes_no_bits(saved, name, prefetch, tmp_path):
    folder, resident = saved(name)
    if prefetch == "trained":
        prefetch = str(tmp_path / "predictor.npz")
        save_random_predictor(resident.config, prefetch)
    tokens = torch.arange(3, 9)[None]
    new = 40 if prefetch == "transitions" else 16  # it learns while it runs
    expected = resident.generate(tokens, max_new_tokens=new, do_sample=False)
    for cache_experts in (3, 6):
        model = offload.load(folder, cache_experts=cache_experts, prefetch=prefetch, policy="score")
        assert torch.equal(model.generate(tokens, max_new_tokens=new, do_sample=False), expected)
        tried = model.offload.report()["prefetch"]
        assert tried["issued"] >= tried["useful"] + tried["late"] + tried["wasted"]
        if cache_experts == 6:
            assert tried["issued"] > 0
        model.offload.close()


def test_everything_hits_once_it_is_read(saved, tokens):
    folder, _ = saved("olmoe")
    model = offload.load(folder, cache_experts=8)
    model(tokens)
    first = model.offload.report()
    assert 0 < first["misses"] <= 3 * 8
    model.offload.reset()
    model(tokens)
    report = model.offload.report()
    assert (report["misses"], report["hit_rate"], report["bytes_read"]) == (0, 1.0, 0)
    assert report["hits"] == first["hits"] + first["misses"]


def test_expert_weights_are_not_in_the_model(saved):
    folder, resident = saved("mixtral")
    model = offload.load(folder, cache_experts=2)
    assert not [name for name, _ in model.named_parameters() if "experts" in name]
    offloaded = sum(parameter.numel() for parameter in model.parameters())
    assert offloaded < 0.5 * sum(parameter.numel() for parameter in resident.parameters())
    with pytest.raises(ValueError, match="no expert weights to save"):
        model.save_pretrained(folder / "copy")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [64, 96])
def test_bits_do_not_depend_on_where_vectors_and_threads_end(tmp_path, width, threads):
    """Enough rows for several threads to share an elementwise operation, at widths with and without a remainder."""
    config = OlmoeConfig(**{**SHARED, "hidden_size": 64}, intermediate_size=width, num_experts=8, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    resident = load_resident(tmp_path)
    torch.set_num_threads(threads)
    for length in (1, 211):
        tokens = torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            expected = resident(tokens).logits
        for cache_experts in (2, 8):
            model = offload.load(tmp_path, cache_experts=cache_experts)
            assert torch.equal(model(tokens).logits, expected)
            model.offload.close()


@pytest.mark.parametrize(
    "overrides",
    [{}, {"zero_compute_experts": ["zero", "copy", "constant"]}, {"num_shared_experts": 1, "num_dense_layers": 1}],
)
def test_our_own_model(tiny_config, tmp_path, overrides):
    config = tiny_config(**overrides)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    resident = load_resident(tmp_path)
    tokens = torch.randint(0, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = resident(tokens).logits
    expected_ids = resident.generate(tokens, max_new_tokens=8, do_sample=False)
    for cache_experts in (1, 3):
        model = offload.load(tmp_path, cache_experts=cache_experts, record_trace=True)
        assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), expected_ids)
        assert model.offload.trace().num_experts == config.num_experts


def test_fused_checkpoints_need_no_conversion(tmp_path, tokens):
    """A checkpoint whose experts are stored fused, as [E, 2F, D] and [E, D, F]."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["olmoe"]())
    model.config.save_pretrained(tmp_path)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    for io in ("cached", "direct"):
        assert torch.equal(offload.load(tmp_path, cache_experts=3, io=io)(tokens).logits, expected)


def test_running_in_another_dtype_converts_while_reading(saved, tokens):
    folder, _ = saved("qwen3_moe")
    resident = load_resident(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = resident(tokens).logits
    assert torch.equal(offload.load(folder, cache_experts=3, dtype="bfloat16")(tokens).logits, expected)


def test_left_padded_batches(saved):
    folder, resident = saved("olmoe")
    ids = torch.tensor([[0, 0, 5, 9], [3, 1, 4, 1]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = offload.load(folder, cache_experts=2, record_trace=True)
    assert torch.equal(model.generate(ids, **arguments), resident.generate(ids, **arguments))
    trace = model.offload.trace()
    assert trace.num_tokens == 2 + 4 + 2 * 5
    assert sorted(set(trace.sequence_T.tolist())) == [0, 1]
    assert trace.position_T[trace.sequence_T == 0].tolist() == list(range(2 + 5))


def test_trace_is_what_the_router_chose(saved, tokens):
    folder, resident = saved("qwen3_moe")
    with torch.no_grad():
        router_logits = resident(tokens, output_router_logits=True).router_logits
    model = offload.load(folder, cache_experts=4, record_trace=True)
    model(tokens)
    model(tokens)
    trace = model.offload.trace()
    assert trace.expert_TLK.shape == (2 * 26, 3, 4)
    for layer, logits in enumerate(router_logits):
        assert (trace.expert_TLK[:26, layer] == logits.topk(4, dim=-1).indices.numpy()).all()
    assert trace.sequence_T.tolist() == sorted(trace.sequence_T.tolist())
    assert len(set(trace.sequence_T.tolist())) == 4
    assert trace.expert_TLK.min() > EMPTY
    with pytest.raises(ValueError, match="record_trace=True"):
        offload.load(folder, cache_experts=4).offload.trace()


def test_a_shard_truncated_while_running_is_an_error_and_the_model_recovers(saved, tokens, tmp_path):
    original, resident = saved("mixtral")
    folder = shutil.copytree(original, tmp_path / "copy")
    model = offload.load(folder, cache_experts=2, io="cached")
    shards = sorted(folder.glob("*.safetensors"))
    whole = {shard: shard.read_bytes() for shard in shards}
    for shard in shards:
        os.truncate(shard, 4096)
    with pytest.raises(OSError, match=r"expert \d+ of MoE layer \d+ failed: .*safetensors: the file ends at byte"):
        model(tokens)
    for shard, content in whole.items():
        with shard.open("r+b") as file:
            file.write(content)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, resident(tokens).logits)


def test_short_reads_are_finished(saved, tokens, monkeypatch):
    folder, resident = saved("olmoe")
    real = os.preadv

    def short(descriptor, buffers, offset):
        return real(descriptor, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    model = offload.load(folder, cache_experts=2, io="cached")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, resident(tokens).logits)


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("layers.1.mlp.experts.3.up_proj", "needs 8 experts; the checkpoint has 7"),
        ("layers.1.self_attn.q_proj", "no tensor for"),
    ],
)
def test_missing_tensors(saved, tmp_path, victim, message):
    folder = shutil.copytree(saved("olmoe")[0], tmp_path / "copy")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if victim not in name}
    for file in set(index["weight_map"].values()):
        tensors = load_file(folder / file)
        save_file({name: tensor for name, tensor in tensors.items() if name in kept}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(ValueError, match=message):
        offload.load(folder, cache_experts=2)


def test_wrong_arguments(saved, tmp_path):
    folder, _ = saved("olmoe")
    with pytest.raises(ValueError, match=r"too small for one token's experts.*give at least"):
        offload.load(folder, cpu_memory="100MiB")
    with pytest.raises(ValueError, match="no such folder"):
        offload.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="unknown cache policy"):
        offload.load(folder, cache_experts=2, policy="best")
    with pytest.raises(ValueError, match="io must be"):
        offload.load(folder, cache_experts=2, io="mmap")


def test_dense_models_have_no_experts_to_cache(tmp_path):
    config = transformers.LlamaConfig(**SHARED, intermediate_size=24)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no experts for cache_experts to act on"):
        offload.load(tmp_path, cache_experts=2)


def test_a_model_that_was_not_loaded_by_us_is_refused(saved, tokens):
    folder, _ = saved("olmoe")
    assert offload.load  # makes its experts known to transformers
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="expertier_offload")
    with pytest.raises(ValueError, match=r"offload\.load"):
        model(tokens)


@pytest.mark.parametrize("cache_experts", [3, 8])
def test_many_rows_fill_the_next_layers_free_slots_ahead(saved, cache_experts):
    folder, resident = saved("olmoe")
    prompt = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(3))
    model = offload.load(folder, cache_experts=cache_experts)
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, resident(prompt).logits)
        first = model.offload.report()
        assert torch.equal(model(prompt).logits, resident(prompt).logits)
    ahead = first["prefetch"]
    assert ahead["issued"] == 2 * cache_experts  # of three layers, all but the first
    assert ahead["wasted"] == 0
    assert model.offload.report()["prefetch"]["issued"] == ahead["issued"]  # no slot is free any more
    model.offload.close()


def test_few_rows_fill_nothing_ahead(saved):
    folder, _ = saved("olmoe")
    model = offload.load(folder, cache_experts=8)
    model(torch.tensor([[1, 2, 3]]))
    assert model.offload.report()["prefetch"]["issued"] == 0
