"""Checkpoints far larger than the disk: sparse files with true heads."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from offload.checkpoint.numbering import trace_elements
from tests.sparse_checkpoint import save_sparse

LOAD = """
import json, sys, time
import transformers.models.qwen3_moe.modeling_qwen3_moe, offload
from offload.memory.budget import peak_bytes, resident_bytes
before, started = resident_bytes(), time.process_time()
memory = offload.load(sys.argv[1], cache_experts=1).offload.report()["memory"]
held = memory["slot_bytes"] + memory["weight_bytes"]
print(json.dumps({"seconds": time.process_time() - started, "bytes": peak_bytes() - before - held}))
"""


@pytest.mark.slow
def test_a_thousand_gb_load_in_seconds_and_take_little_beside_their_slots(tmp_path):
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": 1000,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 5000,
        "num_experts": 1024,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 256,
        "dtype": "bfloat16",
    }
    assert save_sparse(tmp_path, config, shard_bytes=5 * 10**9) > 10**12
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["seconds"] <= 10
    assert found["bytes"] <= 300 * 10**6


SHAPES = {
    "one": [(3, 4)],
    "two": [(5, 7), (5, 7)],
    "different widths": [(2, 3), (4, 5), (1, 1)],
    "more than a piece": [(1100, 1000), (500, 1000)],
    "axes": [(2, 3, 4)],
    "vector": [(6,)],
}
CONVERSIONS = {
    "joined": lambda parts: torch.cat([part.reshape(-1) for part in parts]),
    "reversed": lambda parts: torch.cat([part.reshape(-1) for part in parts[::-1]]),
    "turned": lambda parts: torch.cat([part.transpose(0, -1).reshape(-1) for part in parts]),
    "doubled": lambda parts: torch.cat([part.reshape(-1)[:1].expand(part.numel()) for part in parts]),
    "cut": lambda parts: parts[0].reshape(-1)[:-1],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_elements_are_traced_as_their_numbers_would_be(kind, name):
    shapes, convert = SHAPES[name], CONVERSIONS[kind]
    counts = [prod(shape) for shape in shapes]
    whole = torch.arange(sum(counts)).split(counts)
    numbers = convert([part.view(shape) for part, shape in zip(whole, shapes, strict=True)])
    places = [0, *(numbers.diff() != 1).nonzero()[:, 0].add(1).tolist()]
    found = trace_elements(convert, shapes, most_runs=8)
    assert found.shape == tuple(numbers.shape)
    assert found.is_whole == (numbers.sort().values.tolist() == list(range(sum(counts))))
    if numbers.numel() == sum(counts):
        assert found.starts == tuple(places[:9])
        assert found.numbers == tuple(numbers[places[:9]].tolist())
