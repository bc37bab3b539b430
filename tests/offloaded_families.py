"""Every family offloaded under the least budget that is accepted, each in a forked process: peaks are its own.

Run as a module, because a process that has computed with several threads must not be forked.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY = 151_936
HEADS, HEAD = 16, 64
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model"), 512),
    **dict.fromkeys(("num_attention_heads", "n_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "index_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), HEAD),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "indexer_head_dim", "indexer_budget"), HEAD),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"), 256),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size"), 256),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 256),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 16),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 4096),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": 1024,
    "linear_num_key_heads": 4,
    "mamba_expand": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_compress_ratio": 4,
    "sliding_window": 128,
    "eos_token_id": None,
}
LATENT = {"num_key_value_heads": HEADS, "head_dim": 32, "q_lora_rank": 96, "kv_lora_rank": 64}
LATENT |= {"qk_rope_head_dim": 32, "qk_nope_head_dim": HEAD, "v_head_dim": HEAD}
DEPTH = ("num_hidden_layers", "n_layers", "num_layers")
OWN_LAYERS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "lfm2_moe": {},
}


def measure_families(names: list[str], context: int) -> dict[str, dict[str, Any]]:
    """By family: `limit_bytes` and `peak_bytes` of a prompt of `context` tokens, or `error`."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.offloaded_families", str(context), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def layers_of(model_type: str) -> dict[str, Any]:
    """One layer of each kind that the family's own config has, three at least."""
    from transformers import CONFIG_MAPPING

    if model_type in OWN_LAYERS:
        changes = OWN_LAYERS[model_type]
        return changes | dict.fromkeys(DEPTH, len(changes.get("layers_block_type", "abc")))
    config = CONFIG_MAPPING[model_type]().get_text_config()
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    depth = max(3, len(kinds))
    changes = {"layer_types": (kinds * depth)[:depth]} if kinds else {}
    if feed_forwards := list(dict.fromkeys(getattr(config, "mlp_layer_types", None) or ())):
        changes["mlp_layer_types"] = (feed_forwards + feed_forwards[-1:] * depth)[:depth]
    if getattr(config, "num_attention_heads_per_layer", None):
        changes["num_attention_heads_per_layer"] = [HEADS] * depth
    return changes | dict.fromkeys(DEPTH, depth)


def _save(model_type: str, folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from tests import test_offload_runtime_families as families

    families.MLA.update(LATENT)
    families.FULL["num_key_value_heads"] = HEADS
    for part in families.OUTER.get(model_type, {}).values():
        part["adapter_out_dim"] = SIZES["hidden_size"]
    config = families._small_config(model_type, SIZES | layers_of(model_type))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return {}


def _measure(folder: Path, context: int) -> dict[str, Any]:
    import torch

    import offload
    from offload.forecast.fit import fit
    from offload.memory.budget import peak_bytes
    from tests.offloaded_process import NOISE_BYTES

    fit(folder, context=context)  # imports the model's code, which the process then holds already
    limit = fit(folder, context=context).budgets.least_bytes + NOISE_BYTES
    model = offload.load(folder, cpu_memory=limit, context=context)
    prompt = torch.randint(3, VOCABULARY, (1, context - 4), generator=torch.Generator().manual_seed(0))
    for sampling in ({"do_sample": False}, {"do_sample": True, "top_p": 0.9}):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, pad_token_id=0, **sampling)
    return {"limit_bytes": limit, "peak_bytes": peak_bytes()}


def _forked(work: Any, *given: Any) -> dict[str, Any]:
    """What `work` returns in a child process."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            found = work(*given)
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"[:800]}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        told = stream.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else {"error": "killed"}


def _main(context: int, names: list[str]) -> None:
    import torch
    import transformers

    import offload.forecast.fit  # noqa: F401  imported once, before the forks
    from tests import test_offload_runtime_families  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for name in names:
        folder = Path(tempfile.mkdtemp())
        found[name] = _forked(_save, name, folder) or _forked(_measure, folder, context)
        shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
