"""A model larger than each of two processes may be: both serve it, and one with resident weights cannot load it."""

import json
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.evidence.memory_limit import run_limited
from moe import MoEConfig, MoEForCausalLM, save_byte_tokenizer
from placement import Cluster, Plan

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
E, L = 128, 2
LIMIT = 1000 * MIB
"""Of each process. Python with torch takes about half of it; the rest has to do for weights."""
BUDGET = "950MiB"
MOST_S = 300
OPTIONS = ("--prompt", "the quick brown fox", "--max-new-tokens", "16", "--arithmetic", "fixed", "--cpu-memory")
RESIDENT = "import sys; from experiments.evidence.resident import load_resident; load_resident(sys.argv[1])"


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "model")
    yield tmp_path / "model"
    shutil.rmtree(tmp_path / "model")


def write_model(folder):
    """A checkpoint of 1.2 GB, nearly all of it experts; its weights are one expert's noise, shifted for each."""
    config = MoEConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=1536,
        num_hidden_layers=L,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=E,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = MoEForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            filled(parameter, is_norm="norm" in name or "Norm" in type(module).__name__)
    for buffer in model.buffers():
        buffer.zero_()
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)


@torch.no_grad()
def filled(parameter: nn.Parameter, *, is_norm: bool) -> None:
    if is_norm or parameter.ndim == 1:
        parameter.fill_(1.0)
    elif parameter.ndim < 3:
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    else:
        noise = torch.randn(parameter[0].numel()) * parameter.shape[-1] ** -0.5
        for number in range(len(parameter)):
            parameter[number] = noise.roll(997 * number).view_as(parameter[0])


def plan_of(path):
    """Even experts on one process, odd ones on the other."""
    row = [*range(0, E, 2), *range(1, E, 2)]
    plan = Plan(
        physical_to_logical_LP=np.array([row] * L),
        num_experts=E,
        cluster=Cluster.grid(1, 2),
        layer_ids=tuple(range(L)),
        hidden_layers=L,
    )
    plan.save(path)
    return path


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def generated(folder, report, *options):
    return [sys.executable, "-m", "experiments.cli", "generate", str(folder), *OPTIONS, *options, "--json", str(report)]


def as_rank(rank, port, command):
    """The command as torchrun would start it; each process needs a control group of its own."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    names |= {"TORCHELASTIC_RUN_ID": "limited", "OMP_NUM_THREADS": 1}
    return ["env", *(f"{name}={value}" for name, value in names.items()), *command]


@pytest.mark.slow
def test_two_processes_serve_what_one_of_their_size_cannot_load(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert weights > LIMIT + 100 * MIB
    try:
        alone = run_limited([sys.executable, "-c", RESIDENT, str(folder)], LIMIT, MOST_S)
    except ValueError as error:
        pytest.skip(str(error))
    assert alone.returncode == -9, alone.stderr  # the kernel ended it
    assert run_limited([sys.executable, "-c", RESIDENT, str(folder)], None, MOST_S).returncode == 0

    plan, port = plan_of(tmp_path / "plan.json"), free_port()
    command = generated(folder, tmp_path / "two.json", BUDGET, "--processes", "2", "--plan", str(plan))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_limited, as_rank(rank, port, command), LIMIT, MOST_S) for rank in range(2)]
        both = [one.result() for one in runs]
    assert [one.returncode for one in both] == [0, 0], [one.stderr for one in both]
    assert all(one.peak_bytes <= LIMIT for one in both)

    whole = run_limited(generated(folder, tmp_path / "one.json", "2GiB"), None, MOST_S)
    assert whole.returncode == 0, whole.stderr
    found, right = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert found["token_ids"] == right["token_ids"]
    assert len(set(right["token_ids"])) >= 3
