"""The offloading benchmark: its parity gate, its contestants on a small replay, and its memory limit."""

import json

import gguf
import numpy as np
import pytest
import torch

import offload
from experiments.bench.offloading import bench as bench_offload
from experiments.bench.offloading import gguf_file, llama_cpp
from experiments.bench.offloading.catalogue import CONTESTANTS, defaults_of
from experiments.bench.offloading.contestants import contest, load_model
from experiments.evidence import memory_limit
from experiments.evidence.replay import ReplaySize, build_replay
from offload.cache.catalogue import CACHES, NEEDS_FUTURE, NEEDS_PREDICTOR
from routing.traces import RoutingTrace


def replay(folder, form):
    rng = np.random.default_rng(0)
    expert_TLK = np.stack([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(30)]).astype(np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(30, np.int32), metadata={"num_experts": 8})
    build_replay(trace, folder, ReplaySize(hidden=128, expert=64, form=form))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return replay(tmp_path, "plain")


@pytest.mark.parametrize("form", ["plain", "mxfp4"])
def test_parity_gate(form):
    bench_offload.check_parity(form)


def test_who_cannot_read_codes_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="resident cannot read experts as fp8; ours, ours-fast, ours-lru, "):
        bench_offload.bench_offload(tmp_path, form="fp8", contestant=["resident"])
    with pytest.raises(ValueError, match="unknown form 'fp4'"):
        bench_offload.bench_offload(tmp_path, form="fp4")


def test_a_folder_of_another_form_is_refused(checkpoint):
    with pytest.raises(ValueError, match="has experts as plain, not as int4"):
        bench_offload.bench_offload(checkpoint, form="int4", contestant=["ours"])


def test_contestants_agree(checkpoint):
    measured = {
        name: contest(name, checkpoint, "none", prefill=8, decode=6) for name in ("ours", "ours-lru", "resident")
    }
    assert measured["ours"]["logits"] == measured["ours-lru"]["logits"] == measured["resident"]["logits"]
    assert len(measured["ours"]["step_s"]) == 6
    assert 0 < measured["ours"]["hit_rate"] <= 1
    with pytest.raises(ValueError, match="unknown contestant"):
        contest("theirs", checkpoint, "none", 2, 2)


def test_a_failing_program_is_reported(tmp_path):
    finished = memory_limit.run_limited(["sh", "-c", "echo hello; exit 3"], None, 10)
    assert (finished.returncode, finished.stdout, finished.peak_bytes) == (3, "hello\n", None)


def test_dropping_cached_pages_keeps_the_files(tmp_path):
    (tmp_path / "a").write_text(json.dumps([1]))
    memory_limit.drop_cached(tmp_path)
    assert (tmp_path / "a").read_text() == "[1]"


def test_blocks_of_four_bits_as_ggml_has_them():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[torch.arange(32).roll(3)]  # 13, 14, 15, 0, 1, ...
    pairs = (codes[0::2] | codes[1::2] << 4).view(1, 1, 1, 16)
    found = gguf_file.q4_blocks(pairs, torch.tensor([[[[120]]]], dtype=torch.uint8)).flatten()
    assert found[0] == 120
    assert [int(byte) & 15 for byte in found[1:]] == codes[:16].tolist()
    assert [int(byte) >> 4 for byte in found[1:]] == codes[16:].tolist()


@pytest.mark.parametrize("form", ["mxfp4", "int4"])
def test_a_gguf_file_holds_the_codes_and_scales_of_the_checkpoint(form, tmp_path):
    """Values are those of the owner's dequantisation; int4 before its rounding to bfloat16."""
    replay(tmp_path / "stored", form)
    read = gguf.GGUFReader(gguf_file.gguf_of(tmp_path / "stored"))
    found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in read.tensors}
    offload.dequantise(tmp_path / "stored", tmp_path / "plain")
    plain = load_model("resident", tmp_path / "plain", "none", 32)
    for layer, module in enumerate(plain.model.layers):
        experts, prefix = module.mlp.experts, f"blk.{layer}."
        up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        if form == "mxfp4":
            up, down = up.mT, down.mT
            gate, up = up[:, 0::2], up[:, 1::2]
            biases = {"gate": experts.gate_up_proj_bias[:, 0::2], "up": experts.gate_up_proj_bias[:, 1::2]}
            for part, bias in (biases | {"down": experts.down_proj_bias}).items():
                assert np.array_equal(found[f"{prefix}ffn_{part}_exps.bias"], bias.detach().float().numpy())
            sinks = module.self_attn.sinks.detach().float()
            assert np.array_equal(found[f"{prefix}attn_sinks.weight"], sinks.numpy())
        else:
            gate, up = up.chunk(2, dim=1)
        for part, weight in {"gate": gate, "up": up, "down": down}.items():
            values = torch.from_numpy(found[f"{prefix}ffn_{part}_exps.weight"].copy())
            assert torch.equal(values if form == "mxfp4" else values.bfloat16().float(), weight.float())
            tensor = next(each for each in read.tensors if each.name == f"{prefix}ffn_{part}_exps.weight")
            assert tensor.tensor_type.name == gguf_file.TYPES[form]
    assert {each.name for each in read.tensors if each.tensor_type.name == "F32"} == {
        name for name, values in found.items() if values.ndim == 1 or "ffn_gate_inp" in name or name.endswith(".bias")
    }


def test_our_reader_takes_the_gguf_file_for_the_same_model(tmp_path):
    stored = replay(tmp_path / "stored", "mxfp4")
    file = gguf_file.gguf_of(stored).rename(tmp_path / "model.gguf")
    config = json.loads((stored / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = []
    for source in (stored, file):
        model = offload.load(source, cache_experts=3)
        with torch.inference_mode():
            logits.append(model(torch.arange(20)[None]).logits)
        model.offload.close()
    assert torch.equal(*logits)


def test_a_form_that_gguf_has_no_type_for_is_named_in_the_row(tmp_path):
    row = bench_offload.run_contestant("llama.cpp", replay(tmp_path, "fp8"), "none", 4, 2, None)
    assert row["tok_per_s"] is None
    assert "no type for blocks of FP8" in row["note"]
    assert "llama.cpp" in defaults_of("fp8")


@pytest.mark.skipif(not llama_cpp.is_available(), reason=llama_cpp.NOT_INSTALLED)
@pytest.mark.parametrize("form", ["plain", "mxfp4", "int4"])
def test_llama_cpp_computes_the_same_model(form, tmp_path):
    checkpoint = replay(tmp_path / "stored", form)
    plain = checkpoint
    if form != "plain":
        plain = tmp_path / "plain"
        offload.dequantise(checkpoint, plain)
    file = gguf_file.gguf_of(checkpoint)
    engine = llama_cpp.LlamaCpp(file, 32, 1, is_repacked=False)
    with torch.inference_mode():
        expected = load_model("resident", plain, "none", 32).float()(torch.arange(20)[None]).logits[0]
    for ids in (list(range(12)), [12], [13], list(range(14, 20))):
        found = torch.from_numpy(engine(ids))
        torch.testing.assert_close(found, expected[ids[-1]], rtol=0, atol=0.02 * float(expected.abs().max()))
    assert gguf_file.gguf_of(checkpoint) == file
    with pytest.raises(OSError, match="cannot load"):
        llama_cpp.LlamaCpp(checkpoint / "config.json", 32, 1, is_repacked=False)


def test_an_unknown_contestant_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"unknown contestant 'theirs'; there are accelerate, llama\.cpp, ours"):
        bench_offload.bench_offload(tmp_path, contestant=["theirs"])


def test_a_misspelt_contestant_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'ours-lrru' \(did you mean 'ours-lru'\?\)"):
        bench_offload.bench_offload(tmp_path, contestant=["ours-lrru"])


def test_prefetching_contestants_need_a_predictor_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="ours-compressed-ahead needs --predictor"):
        bench_offload.bench_offload(tmp_path, contestant=["ours", "ours-compressed-ahead"])


def test_every_policy_that_can_run_is_a_contestant():
    policies = {row.arguments["policy"] for row in CONTESTANTS.values() if "policy" in row.arguments}
    assert policies == set(CACHES) - NEEDS_FUTURE
    ahead = {row.arguments["policy"] for row in CONTESTANTS.values() if row.is_ahead and "policy" in row.arguments}
    assert ahead == NEEDS_PREDICTOR


def test_who_runs_at_which_limit():
    runs = {name: (row.runs_under("4GiB"), row.runs_under("none")) for name, row in CONTESTANTS.items()}
    assert {name for name, both in runs.items() if both != (True, True)} == {"accelerate", "resident"}
    assert (runs["accelerate"], runs["resident"]) == ((True, False), (False, True))


def test_without_llama_cpp_its_row_says_so(checkpoint, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    row = bench_offload.run_contestant("llama.cpp", checkpoint, "none", 4, 2, None)
    assert row["tok_per_s"] is None
    assert "not installed" in row["note"]
