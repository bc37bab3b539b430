"""Checkpoints made from a config: transformers reads them, holes take no room, scales stand beside codes."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from experiments.bench.systems.loading import config_of
from experiments.evidence.generated import checkpoint_bytes, save_generated

TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
}


def test_a_model_of_random_weights_is_whole_and_follows_its_seed(tmp_path):
    written = save_generated(tmp_path / "a", TINY, shard_bytes=20_000, seed=1)
    assert written.nbytes == checkpoint_bytes(TINY)
    assert written.shards > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()
    save_generated(tmp_path / "b", TINY, shard_bytes=20_000, seed=1)
    save_generated(tmp_path / "c", TINY, shard_bytes=20_000, seed=2)
    first, again, other = (
        b"".join(file.read_bytes() for file in sorted((tmp_path / name).glob("*.safetensors"))) for name in "abc"
    )
    assert first == again
    assert first != other


def test_holes_take_no_room_and_codes_have_scales(tmp_path):
    config = config_of(4 * 10**9, "fp8", layers=2, experts=8)
    written = save_generated(tmp_path, config, shard_bytes=10**9)
    assert written.nbytes == pytest.approx(4 * 10**9, rel=0.01)
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) < 10**6
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            keys = [key for key in opened.keys() if key.startswith(name)]  # noqa: SIM118  safe_open is no dict
            found |= {key: opened.get_slice(key).get_shape() for key in keys}
    rows, columns = found[name]
    assert found[f"{name}_scale_inv"] == [-(-rows // 128), -(-columns // 128)]
    with pytest.raises(ValueError, match="random bytes are no codes"):
        save_generated(tmp_path, config, shard_bytes=10**9, seed=0)
