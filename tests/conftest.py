"""Shared fixtures: quiet libraries, tolerances, tiny models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

TOLERANCES = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-8},
    torch.float32: {"atol": 1e-5, "rtol": 1e-4},
    # half an ulp of bfloat16 is 2**-9 of the value; sums of a few such terms
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
}


@pytest.fixture
def tolerance():
    """The one tolerance table, by dtype; never relaxed without a written reason."""
    return TOLERANCES


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """A function from overrides to a MoEConfig that builds in milliseconds."""
    from moe import MoEConfig

    def build(**overrides):
        sizes = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "initializer_range": 0.2,
        }
        return MoEConfig(**(sizes | overrides))

    return build
