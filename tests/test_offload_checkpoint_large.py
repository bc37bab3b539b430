"""Checkpoints far larger than the disk: sparse files with true heads."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from experiments.bench.systems.loading import config_of
from experiments.evidence.generated import save_generated
from offload.checkpoint.numbering import trace_elements

LOAD = """
import json, sys
import offload
from experiments.bench.systems.loading import measure
from offload.checkpoint import tensors
offload.load
read, heads = tensors.read_header, []
tensors.read_header = lambda file: heads.append(file) or read(file)
print(json.dumps({**measure(sys.argv[1]), "heads": len(heads)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "fp8"])
def test_a_thousand_gb_take_little_beside_their_slots_and_each_head_is_read_once(tmp_path, form):
    written = save_generated(tmp_path, config_of(10**12, form, layers=16, experts=1024), shard_bytes=5 * 10**9)
    assert written.nbytes > 0.999 * 10**12
    assert written.tensors > {"plain": 49_000, "fp8": 98_000}[form]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["heads"] == written.shards
    assert found["beside_bytes"] <= 300 * 10**6


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
