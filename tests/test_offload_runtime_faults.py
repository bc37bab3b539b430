"""What a process cannot choose: being killed, having a neighbour on the same checkpoint, running for a long time."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload

GENERATE = """
import sys, torch, offload
torch.set_num_threads(1)
model = offload.load(sys.argv[1], cache_experts=3, policy="lru")
print("loaded", flush=True)
for turn in range(int(sys.argv[2])):
    ids = model.generate(torch.arange(3, 9)[None], max_new_tokens=24, do_sample=False)
print(ids[0].tolist(), flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder, and what the resident model generates."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, vocab_size=64)
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    resident = AutoModelForCausalLM.from_pretrained(folder).eval()
    return folder, resident.generate(torch.arange(3, 9)[None], max_new_tokens=24, do_sample=False)[0].tolist()


def start(folder, turns):
    command = [sys.executable, "-c", GENERATE, str(folder), str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_processes_on_one_checkpoint_and_one_of_them_killed(checkpoint):
    folder, expected = checkpoint
    before = {file: file.read_bytes() for file in folder.iterdir()}
    killed, other = start(folder, 100_000), start(folder, 5)
    assert killed.stdout.readline() == "loaded\n"
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    printed, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    assert printed.splitlines()[-1] == str(expected)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_tokens(checkpoint):
    model = offload.load(checkpoint[0], cache_experts=3, prefetch="transitions")
    token, process = torch.tensor([[5]]), psutil.Process()
    sizes = []
    with torch.inference_mode():
        for step in range(10_000):
            token = model(token, use_cache=False).logits[:, -1:].argmax(dim=-1)
            if step % 1000 == 999:
                sizes.append(process.memory_info().rss)
    model.offload.close()
    assert max(sizes[1:]) - sizes[0] < 8 << 20
