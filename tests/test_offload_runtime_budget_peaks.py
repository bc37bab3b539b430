"""The memory budget is a promise: a process that fits its model into the least budget stays below it."""

import pytest

from offload.store.packing import write_pack
from tests.offloaded_process import run_offloaded, save_model

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
