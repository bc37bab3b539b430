"""`expertier bench step`: what a decoder layer costs one token besides its weights, against the resident model.

The model is one of transformers with narrow weights and the keys and values of a large one, so that attention over the
cache, norms, rotary positions, the router, look-up and Python take the time.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.expect import expect_name
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record
from .listed import listed

OURS, RESIDENT = "offload", "resident"
WARM_UP_STEPS = 4  # the first steps try kernels and learn which linear layers share an input
PIECE = 512  # positions of a prompt that are computed at once
SEED = 0
# of the model: heads of keys and values as in OLMoE (16 of 128), weights of 4 MB a layer outside experts
SIZES = {
    "hidden_size": 256, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 256, "max_position_embeddings": 8192,
    "num_experts": 32, "num_local_experts": 32, "num_experts_per_tok": 4,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GROUPS = {"n_routed_experts": 32, "n_shared_experts": 2, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 0}
# what a family needs besides: keys that eight heads share, as in GPT-OSS; groups of experts and latent keys, as in
# DeepSeek-V3; shared experts, all of a width that torch's order is known for
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {"head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8},
    "qwen2_moe": {"shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    "glm4_moe": {**GROUPS, "num_key_value_heads": 8},
    "deepseek_v3": {
        **GROUPS, "head_dim": 64, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
}  # fmt: skip


def bench_step(
    family: Annotated[list[str] | None, typer.Option(help="A model type; repeat for more.")] = None,
    contexts: Annotated[str, typer.Option(help="Positions in the cache, with commas.")] = "16,512,2048",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 12,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(min=5, help="Timed steps of each contestant.")] = 15,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Time decode steps of models with narrow weights: what surrounds the products, per layer and context.

    Steps of both contestants take turns. Logits of all steps must be equal, bit by bit, or no time is printed. On a
    busy machine compare the seconds of processors, with one thread.

    Example: `expertier bench step --family qwen3_moe --contexts 16,2048 --threads 1`
    """
    expect_records(records)
    lengths, families = listed(contexts, "--contexts"), family or list(FAMILIES)
    for name in families:
        expect_name(name, FAMILIES, "family")
    rows = [row for name in families for row in measure(name, lengths, layers, threads, repeats)]
    table = Table("family", "positions", "contestant", "ms per layer", "p20", "p80", "of processors")
    for row in rows:
        numbers = (f"{row[f'layer_ms_{name}']:.3f}" for name in ("p50", "p20", "p80", "cpu"))
        table.add_row(row["family"], str(row["positions"]), row["contestant"], *numbers)
    plain_console().print(table)
    if record:
        config = {"layers": layers, "threads": threads, "repeats": repeats, "sizes": SIZES | {"families": FAMILIES}}
        typer.echo(f"record: {save_record('offload-step', rows, config=config, seed=SEED, folder=records)}")


def measure(family: str, contexts: list[int], layers: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per layer of a decode step, at each context for both contestants.

    Args:
        family: key of FAMILIES.
        contexts: positions in the cache when the first step begins.
        layers: of the model; all have experts.
        threads: of torch, set back afterwards.
        repeats: timed steps of each contestant at each context.

    Raises:
        RuntimeError: if logits of the two differ.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            models = _models(family, layers, Path(folder))
            rows = [row for positions in contexts for row in _measured_at(family, models, positions, layers, repeats)]
            models[OURS].offload.close()
        return rows
    finally:
        torch.set_num_threads(before)


def _models(family: str, layers: int, folder: Path) -> dict[str, Any]:
    """The same checkpoint for both contestants."""
    import torch
    import transformers

    import offload

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config_class = transformers.CONFIG_MAPPING[family]
    sizes = SIZES | {"num_hidden_layers": layers} | FAMILIES[family]
    known = config_class().to_dict().keys() | getattr(config_class, "attribute_map", {}).keys()
    torch.manual_seed(SEED)
    config = config_class(**{name: value for name, value in sizes.items() if name in known})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    resident = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return {OURS: offload.load(folder, cache_experts=SIZES["num_experts"]), RESIDENT: resident}


def _measured_at(
    family: str, models: dict[str, Any], positions: int, layers: int, repeats: int
) -> list[dict[str, Any]]:
    steps = {name: _decoder(model, positions) for name, model in models.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(WARM_UP_STEPS + repeats):
        logits = {}
        for name in list(steps)[:: -1 if number % 2 else 1]:
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            logits[name] = steps[name](number)
            if number >= WARM_UP_STEPS:
                samples[name].append((time.perf_counter() - start_s, time.process_time() - start_cpu_s))
        _require_equal(logits, family, positions + number)
    shared = {"family": family, "positions": positions}
    return [{**shared, "contestant": name, **_per_layer(taken, layers)} for name, taken in samples.items()]


def _per_layer(samples: list[tuple[float, float]], layers: int) -> dict[str, float]:
    """Quantiles of the steps' seconds, and the median of their processor seconds, in milliseconds per layer."""
    elapsed_s, processor_s = zip(*samples, strict=True)
    p20, p50, p80 = (quantiles(elapsed_s, n=10)[place] * 1e3 / layers for place in (1, 4, 7))
    cpu = median(processor_s) * 1e3 / layers
    return {"layer_ms_p50": p50, "layer_ms_p20": p20, "layer_ms_p80": p80, "layer_ms_cpu": cpu}


def _require_equal(logits: dict[str, Any], family: str, positions: int) -> None:
    import torch

    if not torch.equal(logits[OURS], logits[RESIDENT]):
        raise RuntimeError(f"parity is red, so no time is printed: {family} at {positions} positions, logits differ")


def _decoder(model: Any, positions: int) -> Callable[[int], Any]:
    """A function that decodes a token after a prompt of random ids, and gives its logits."""
    import torch
    from transformers import DynamicCache

    vocabulary = int(model.config.vocab_size)
    prompt = torch.randint(vocabulary, (1, positions), generator=torch.Generator().manual_seed(SEED))
    cache = DynamicCache(config=model.config)
    for piece in prompt.split(PIECE, dim=1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode(number: int) -> Any:
        token = torch.tensor([[number % vocabulary]])
        return model(token, past_key_values=cache, use_cache=True).logits

    return decode
