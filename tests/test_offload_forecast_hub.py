"""Models of the hub: heads alone for `fit`, the files of the index alone for `load`, over HTTP from this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from experiments.evidence.generated import save_generated
from tests.gguf_models import TinyGguf, metadata_of
from tests.small_hub import COMMIT, NAME, SmallHub

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
FIT = """
import json, sys
from offload.forecast.fit import fit
print(json.dumps(fit(sys.argv[1], cpu_memory="64GiB").as_json()))
"""
LOAD = """
import json, sys, offload
from offload.checkpoint.location import local_folder
folder = local_folder(sys.argv[1])
print(json.dumps([str(folder), sorted(file.name for file in (folder if folder.is_dir() else folder.parent).iterdir())]))
"""


@pytest.fixture
def serve(tmp_path):
    hubs = []

    def start(folder, **how):
        hubs.append(SmallHub(folder, **how))
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.close()


def ask(hub, script, model, cache):
    """Run a script against a hub, in a process that may use the network."""
    where = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, model],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Three shards of 20 GB, and what else repositories hold."""
    folder = tmp_path_factory.mktemp("repository")
    config = {**CONFIG, "hidden_size": 2048, "moe_intermediate_size": 8192, "num_experts": 256}
    total = save_generated(folder, config, shard_bytes=20 * 10**9).nbytes
    for name in ("original/model.safetensors", "metal/model.bin", "consolidated.safetensors", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted" * 1000)
    return folder, total


@pytest.mark.parametrize("knows_ranges", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fit_reads_the_heads_of_a_model_on_the_hub_and_no_weights(repository, serve, tmp_path, knows_ranges):
    folder, total = repository
    hub = serve(folder, knows_ranges=knows_ranges)
    done = ask(hub, FIT, NAME, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["moe_layers"] == 2
    assert found["expert_bytes"] == 2 * 256 * 3 * 2048 * 8192 * 2
    assert total > 50 * 10**9
    assert not {name for name in hub.sent if "consolidated" in name or name in ("model.bin", "README.md")}
    if knows_ranges:
        assert sum(hub.sent.values()) < 2 * 10**6
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*") if not file.is_symlink()) < 4 * 10**6


def test_load_takes_what_the_index_names_and_says_how_much_first(serve, tmp_path):
    folder, cache = tmp_path / "repository", tmp_path / "cache"
    folder.mkdir()
    total = save_generated(folder, CONFIG, shard_bytes=4 * 10**6).nbytes
    (folder / "original").mkdir()
    for name in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"not wanted" * 1000)
    hub = serve(folder)
    done = ask(hub, LOAD, NAME, cache)
    assert done.returncode == 0, done.stderr
    place, names = json.loads(done.stdout)
    shards = sorted(file.name for file in folder.glob("model-*.safetensors"))
    assert Path(place).name == COMMIT
    assert names == ["config.json", *shards, "model.safetensors.index.json"]
    assert f"downloading {NAME}: {len(shards)} files, {total / 2**20:.2f} MiB" in done.stderr
    before = dict(hub.sent)
    again = ask(hub, LOAD, NAME, cache)
    assert "downloading" not in again.stderr
    assert {name: hub.sent[name] for name in shards} == {name: before[name] for name in shards}


@pytest.mark.slow
def test_a_gguf_file_of_a_repository(serve, tmp_path):
    folder, cache = tmp_path / "repository", tmp_path / "cache"
    (folder / "Q8").mkdir(parents=True)
    config = Qwen3MoeConfig(**{key: value for key, value in CONFIG.items() if key not in ("model_type", "dtype")})
    torch.manual_seed(0)
    tiny = TinyGguf(AutoModelForCausalLM.from_config(config).float(), "qwen3moe", lambda name: "Q8_0")
    # a vocabulary that is longer than what is asked for at first
    words = {"tokenizer.ggml.tokens": [f"word{number:030d}" for number in range(8000)]}
    tiny.write(folder / "Q8" / "model.gguf", metadata_of(config) | words, split_max_tensors=12)
    (folder / "other.gguf").write_bytes(b"not wanted")
    hub = serve(folder)
    name = f"{NAME}/Q8/model-00001-of-00003.gguf"
    done = ask(hub, FIT, name, cache)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["expert_bytes"] == 2 * 16 * 3 * 256 * 256 * 34 // 32
    assert sum(hub.sent.values()) < 2 * 10**6 < sum(file.stat().st_size for file in folder.rglob("*.gguf"))
    done = ask(hub, LOAD, name, cache)
    assert done.returncode == 0, done.stderr
    place, names = json.loads(done.stdout)
    assert Path(place).name == "model-00001-of-00003.gguf"
    assert names == [f"model-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert f"downloading {NAME}: 3 files" in done.stderr


@pytest.mark.slow
def test_what_is_not_there_is_one_line(serve, tmp_path):
    hub = serve(tmp_path)
    done = ask(hub, FIT, NAME, tmp_path / "cache")
    assert done.returncode == 1
    assert f"model {NAME}: " in done.stderr.splitlines()[-1]
