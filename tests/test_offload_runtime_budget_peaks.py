"""The memory budget is a promise: a process that fits its model into the least budget stays below it."""

from types import SimpleNamespace

import pytest

from offload.runtime.activations import attention_bytes, prefill_tokens, scan_bytes
from offload.store.packing import write_pack
from tests.offloaded_families import measure_families
from tests.offloaded_process import run_offloaded, save_model
from tests.test_offload_runtime_families import _families

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("model_type", "is_packed"),
    [
        ("gpt_oss", False),  # eager attention
        pytest.param("qwen3_moe", False, marks=slow),
        pytest.param("qwen3_next", False, marks=slow),  # the gated delta rule, in torch
        pytest.param("qwen3_moe", True, marks=slow),
    ],
)
def test_the_peak_stays_below_the_budget(model_type, is_packed, tmp_path):
    folder, pack = save_model(model_type, tmp_path / "model"), None
    if is_packed:
        pack = str(write_pack(folder, tmp_path / "experts.pack", is_compressed=True))
    found = run_offloaded(folder, cpu_memory="least", context=1536, prompt_tokens=1500, pack=pack)
    assert found["peak_bytes"] <= found["limit_bytes"], f"{model_type}: {found}"


@slow
def test_the_peak_of_every_family_stays_below_the_budget():
    """With a real vocabulary, the prompt as long as the context, and not a byte more than the least budget."""
    found = measure_families(_families(), context=2048)
    over = {name: one for name, one in found.items() if "error" in one or one["peak_bytes"] > one["limit_bytes"]}
    assert not over
    assert len(found) == len(_families()) > 50


@pytest.mark.slow
def test_a_budget_of_unfused_attention_in_one_family(tmp_path):
    """Values narrower than keys: torch's fused attention does not take them, and scores go to memory."""
    (found,) = measure_families(["deepseek_v3"], context=1024).values()
    assert found["peak_bytes"] <= found["limit_bytes"]


def _config(**sizes):
    sizes = {"num_attention_heads": 8, "hidden_size": 512, "_attn_implementation": "sdpa"} | sizes
    config = SimpleNamespace(**sizes)
    config.get_text_config = lambda: config
    return config


FUSED = 100 * 200 * 8


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, FUSED),
        ({"_attn_implementation": "eager"}, FUSED + 100 * 200 * 8 * 12),
        ({"head_dim": 64, "v_head_dim": 64}, FUSED),
        ({"head_dim": 192, "v_head_dim": 128}, FUSED + 100 * 200 * 8 * 12),
        ({"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "head_dim": 64, "v_head_dim": 192}, FUSED),
        ({"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}, FUSED + 100 * 200 * 8 * 12),
        ({"_attn_implementation": "eager", "swa_num_attention_heads": 20}, FUSED + 100 * 200 * 20 * 12),
        ({"rel_extent": 512}, FUSED + 100 * 200 * 8 * 8),
        ({"_attn_implementation": "eager", "num_attention_heads_per_layer": [8, 32]}, FUSED + 100 * 200 * 32 * 12),
        ({"index_n_heads": 4}, FUSED + 100 * 200 * 4 * 8),
    ],
)
def test_scores_that_go_to_memory(sizes, expected):
    assert attention_bytes(_config(**sizes), 100, 200, 2) == expected


def test_long_scans_are_read_in_pieces_too():
    delta = _config(linear_num_heads=32, linear_head_dim=128)
    one_chunk = 64 * 32 * (10 * 256 + (5 + 3 * 128) * 64) * 4  # queries to states; pairs of tokens by channel
    assert scan_bytes(delta, 64) == scan_bytes(delta, 1) == one_chunk
    assert prefill_tokens(delta, 4096) == 256
    assert scan_bytes(delta, 256) <= 1 << 30 < scan_bytes(delta, 512)
    assert prefill_tokens(_config(), 4096) == 4096
