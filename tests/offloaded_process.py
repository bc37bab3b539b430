"""A model offloaded in a process of its own, so that the peak of that process is the model's and nobody else's."""

import json
import subprocess
import sys
from pathlib import Path

SIZES = {
    "vocab_size": 32_768,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 256,
    "intermediate_size": 256,
    "num_experts": 16,
    "num_local_experts": 16,
    "sliding_window": 128,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "layer_types": None,
}

NOISE_BYTES = 8 << 20
"""A process grows by 1 to 4 MiB between two looks at it."""
COMPRESSION_NOISE_BYTES = 10 << 20
"""How far linear layers compress is only known when they are."""


def save_model(model_type: str, folder: Path, **changes: int) -> Path:
    """A model whose activations weigh more than its weights, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.test_offload_runtime_families import _small_config

    config = _small_config(model_type, SIZES | changes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def run_offloaded(folder: Path, *prefix: str, **asked: object) -> dict[str, int]:
    """Fit, load and generate in a new process.

    Args:
        folder: of the model.
        prefix: a command that runs the process.
        asked: cpu_memory ("least" is what `fit` says), context, pack, prompt_tokens.

    Returns:
        limit_bytes, peak_bytes, pieces (tokens of a prompt at once; 0 for all).
    """
    command = [*prefix, sys.executable, "-m", "tests.offloaded_process", str(folder), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def _measure(folder: str, asked: dict) -> dict[str, int]:
    import torch

    import offload
    from offload.forecast.fit import fit
    from offload.memory.budget import peak_bytes

    torch.set_num_threads(1)
    context, pack, limit = asked["context"], asked.get("pack"), asked["cpu_memory"]
    if limit == "least":
        fit(folder, context=context, pack=pack)  # imports the model's code, which the process then holds already
        limit = fit(folder, context=context, pack=pack).budgets.least_bytes
        limit += NOISE_BYTES if pack is None else COMPRESSION_NOISE_BYTES
    model = offload.load(folder, cpu_memory=limit, context=context, pack=pack)
    prompt = torch.randint(3, 30_000, (1, asked["prompt_tokens"]), generator=torch.Generator().manual_seed(0))
    # a draw takes all that a greedy token takes, and the sorted vocabulary
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, pad_token_id=0, do_sample=True, top_p=0.9
    )
    pieces = model.generation_config.prefill_chunk_size or 0
    memory = model.offload.report()["memory"]
    return {"limit_bytes": memory["limit_bytes"], "peak_bytes": peak_bytes(), "pieces": pieces}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], json.loads(sys.argv[2]))))
