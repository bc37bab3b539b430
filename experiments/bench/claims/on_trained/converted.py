"""Trained models written as others by this project's commands, and tuned on: MoLE's ranks, AdaMoE's nulls, Read-ME.

Shapes: B sequences, S positions.
"""

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ...starting_points import command, load, true_load
from ..claim import Row, small_decoder
from ..domains import LENGTH, bits_per_byte, held_out_rows, training_part, tune

DOMAINS = ("prose", "python", "tables")
# of the first training, in steps of the second
FIRST = 4
RANKS = (48, 24, 12, 6)
"""The first is the whole width: nothing is lost."""
GROUP = 4
"""Experts that share a basis: two groups in a layer."""
KEPT = 0.5
"""Share of the hidden channels that a domain keeps, as in the paper's halves."""
TEXT_BYTES = 21_000
"""Of each domain, for masks and rounds."""
ROUNDS = 2
"""Of router and experts in turn; the paper's eight would leave a dozen steps each."""
# tuned for steps by the thousand there, by the hundred here
ROUTER_RATE, EXPERT_RATE = 2e-3, 1e-3
AS_IT_IS = "as it is"


def rank_rows(steps: int, seed: int) -> list[Row]:
    """A mixture with latent experts of several ranks, just after conversion and after some training of all of it."""
    with tempfile.TemporaryDirectory() as place:
        source = _mixture(Path(place) / "source", steps, seed)
        rows = [_tuned(AS_IT_IS, source, steps, seed)]
        for rank in RANKS:
            made = Path(place) / f"rank-{rank}"
            command("convert", source, "--to", "latent", "--group", GROUP, "--rank", rank, "--out", made)
            rows.append(_tuned(f"rank {rank}", made, steps, seed))
    return rows


def null_rows(steps: int, seed: int) -> list[Row]:
    """A mixture with null experts, for more choices and for fewer, just after conversion and after some training."""
    with tempfile.TemporaryDirectory() as place:
        source = _mixture(Path(place) / "source", steps, seed)
        rows = [_tuned(AS_IT_IS, source, steps, seed)]
        for choices in (4, 3):
            made = Path(place) / f"choices-{choices}"
            command("convert", source, "--to", "nulls", "--top-k", choices, "--out", made)
            rows.append(_tuned(f"nulls, {choices} choices", made, steps, seed))
        one = load(source)
        one.model.top_k = 1
        rows.append(_measured("1 expert instead of 2", one, steps, seed))
    return rows


def read_me_rows(steps: int, seed: int) -> list[Row]:
    """A dense model cut into experts by domain, by texts that are blends of all domains, and a dense one of half width.

    The half-width model is trained from scratch, for as many steps as the dense one and the experts together.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense = _llama(96, seed)
        tune(dense, DOMAINS, FIRST * steps, seed)
        dense.save_pretrained(folder / "dense")
        rows = [_by_domain("dense, all channels", dense)]
        half = _llama(round(96 * KEPT), seed)
        tune(half, DOMAINS, (FIRST + 1) * steps, seed)
        rows.append(_by_domain("dense, half width", half))
        for name, texts in {"cut by domain": _texts(), "cut by blends": _blends(seed)}.items():
            files = [folder / f"{name}-{number}.txt" for number in range(len(texts))]
            for file, text in zip(files, texts, strict=True):
                file.write_bytes(text.tobytes())
            made = folder / name.replace(" ", "-")
            command(
                *("refactor", folder / "dense", "--out", made, "--keep", KEPT, "--sequence-length", LENGTH),
                *(part for file in files for part in ("--data", file)),
                *("--rounds", ROUNDS, "--router-steps", steps // ROUNDS, "--expert-steps", steps // ROUNDS),
                *("--router-rate", ROUTER_RATE, "--expert-rate", EXPERT_RATE, "--batch-size", 16, "--seed", seed),
            )
            rows.append(_by_domain(name, load(made)))
    return rows


def _mixture(folder: Path, steps: int, seed: int) -> Path:
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(seed)
    model = MoEForCausalLM(MoEConfig(**small_decoder(vocab_size=256, num_experts=8, router="mixtral")))
    tune(model, DOMAINS, FIRST * steps, seed)
    model.save_pretrained(folder)
    return folder


def _llama(inner_width: int, seed: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    sizes = small_decoder(vocab_size=256, num_hidden_layers=3, intermediate_size=inner_width)
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=False))


def _texts() -> list[Any]:
    return [training_part(name)[:TEXT_BYTES] for name in DOMAINS]


def _blends(seed: int) -> list[Any]:
    """The same bytes, rows of all domains shuffled, in as many texts."""
    rows = np.concatenate([text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH) for text in _texts()])
    return np.array_split(np.random.default_rng(seed).permutation(rows), len(DOMAINS))


def _tuned(name: str, folder: Path, steps: int, seed: int) -> Row:
    return _measured(name, load(folder), steps, seed)


def _measured(name: str, model: Any, steps: int, seed: int) -> Row:
    before = _bits(model)
    tune(model, DOMAINS, steps, seed + 1)
    return {
        "variant": name,
        "bits_converted": before,
        "bits_tuned": _bits(model),
        "experts_per_token": true_load(model, held_out_rows(DOMAINS[0])),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _by_domain(name: str, model: Any) -> Row:
    bits = {f"bits_{domain}": bits_per_byte(model, domain) for domain in DOMAINS}
    return {"variant": name, "bits_mean": fmean(bits.values()), **bits}


def _bits(model: Any) -> float:
    return fmean(bits_per_byte(model, name) for name in DOMAINS)
