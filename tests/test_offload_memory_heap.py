"""What torch and the allocator keep for themselves stays small, as no budget counts it."""

import os
import subprocess
import sys

from offload.memory.heap import PRODUCT_CACHES, keep_few_products

PROMPTS = """
import re, sys, torch
from pathlib import Path
from offload.memory.heap import keep_few_products
def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
keep_few_products()
x_TD, weights = torch.randn(80, 256).bfloat16(), [torch.randn(rows, 256).bfloat16() for rows in (64, 256, 768)]
before = own()
for length in range(2, 80):
    for weight in weights:
        torch.nn.functional.linear(x_TD[:length], weight)
print(own() - before)
"""


def test_prompts_of_many_lengths_leave_little_behind():
    done = subprocess.run([sys.executable, "-c", PROMPTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80  # MiB; 150 and more without the bound, on processors with AMX


def test_what_a_user_chose_stays(monkeypatch):
    monkeypatch.setenv(PRODUCT_CACHES[0], "7")
    monkeypatch.delenv(PRODUCT_CACHES[1], raising=False)
    keep_few_products()
    assert [os.environ[name] for name in PRODUCT_CACHES] == ["7", "16"]
