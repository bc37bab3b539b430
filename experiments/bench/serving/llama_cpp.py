"""llama.cpp under several users: one batch with a token of each, mapped weights, as `llama-server -np N` computes.

Run in a process of its own under the memory limit, with `FOLDER USERS PROMPT NEW_TOKENS` as arguments. There is no
HTTP in it, which is to llama.cpp's advantage.
"""

import json
import sys
import time
from pathlib import Path

from routing.ground.quantity import parse_size

from ...evidence.memory_limit import drop_cached, run_limited
from ..offloading.gguf_file import gguf_of
from ..offloading.llama_cpp import NOT_INSTALLED, LlamaCpp, is_available
from .clients import user_rows
from .measures import Row

TIMEOUT_S = 900.0
"""Most seconds of one run; four users at 6 GiB take about two minutes."""


def peer(checkpoint: Path, limit: str, users: int, new_tokens: int) -> Row:
    """Tokens per second of all users together.

    Args:
        checkpoint: folder of a replay checkpoint; its GGUF file is written if it is missing.
        limit: of memory, page cache included; `auto` is none.
        users: sequences in the batch.
        new_tokens: of each.
    """
    found: Row = {"measure": "llama.cpp", "users": users}
    if not is_available():
        return {**found, "note": NOT_INSTALLED}
    gguf_of(checkpoint)
    drop_cached(checkpoint)  # pages that an earlier run left would count for nobody's limit
    limit_bytes = None if limit == "auto" else parse_size(limit)
    command = [sys.executable, "-m", __name__, str(checkpoint), *map(str, (users, 16, new_tokens))]
    done = run_limited(command, limit_bytes, TIMEOUT_S)
    if done.returncode:
        return {**found, "note": f"exit {done.returncode}: {done.stderr.strip()[-160:]}"}
    return {**found, **json.loads(done.stdout.strip().splitlines()[-1])}


def _decode(checkpoint: Path, users: int, prompt: int, new_tokens: int) -> Row:
    import torch

    context, threads = users * (prompt + new_tokens), torch.get_num_threads()
    engine = LlamaCpp(gguf_of(checkpoint), context, threads, users, is_repacked=False)
    rows = [user_rows(user, prompt + new_tokens) for user in range(users)]
    started_s = time.perf_counter()
    engine.together([row[:prompt] for row in rows], 0)
    prefill_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    for position in range(prompt, prompt + new_tokens):
        engine.together([[row[position]] for row in rows], position)
    decode_s = time.perf_counter() - started_s
    return {"tok_per_s": users * new_tokens / decode_s, "prefill_s": prefill_s, "decode_s": decode_s}


if __name__ == "__main__":
    folder, *counts = sys.argv[1:]
    print(json.dumps(_decode(Path(folder), *map(int, counts))))
