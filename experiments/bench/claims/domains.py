"""Texts of several domains, and byte models that are tuned on them: what claims about experts of domains share.

Shapes: B sequences, S positions.
"""

import sysconfig
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .claim import fit, small_decoder

if TYPE_CHECKING:
    from torch import Tensor

# toy sizes that a core trains in a minute, chosen once; the rate is that of the preset `smoke`
LENGTH, BATCH, RATE, HELD_OUT_ROWS = 64, 16, 3e-3, 48
DOMAIN_BYTES = 300_000
"""Read of each domain: far more than a hundred steps see, and small to keep."""


@lru_cache(maxsize=1)
def domains() -> dict[str, NDArray[np.uint8]]:
    """Bytes by domain, from what Python's standard library brings and from sums that are made here.

    `prose` is its reference manual, `python` sources, `tables` character maps, `markup` the names of HTML's characters,
    `sums` additions, `changes` a history of changes in English.

    Raises:
        ValueError: if this Python was installed without one of these files.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    found = {
        "prose": [library / "pydoc_data" / "topics.py"],
        "python": sorted((library / "asyncio").glob("*.py")),
        "tables": sorted((library / "encodings").glob("cp*.py")),
        "markup": [library / "html" / "entities.py"],
        "changes": sorted((library / "idlelib").glob("NEWS*.txt")),
    }
    texts = {name: b"\n".join(file.read_bytes() for file in files if file.is_file()) for name, files in found.items()}
    draws = np.random.default_rng(0).integers(0, 100, (40_000, 2))
    texts["sums"] = "".join(f"{one}+{other}={one + other}\n" for one, other in draws.tolist()).encode()
    if missing := [name for name, text in texts.items() if len(text) < 20_000]:
        raise ValueError(
            f"this Python's standard library lacks the texts of {', '.join(missing)}; use a full installation"
        )
    return {name: np.frombuffer(text[:DOMAIN_BYTES], np.uint8) for name, text in texts.items()}


def training_part(name: str) -> NDArray[np.uint8]:
    """The first nine tenths of a domain."""
    return domains()[name][: len(domains()[name]) * 9 // 10]


def held_out_rows(name: str, length: int = LENGTH, count: int = HELD_OUT_ROWS) -> "Tensor":
    """int64 [B, S]: rows spread evenly over the last tenth of a domain."""
    import torch

    text = domains()[name][len(training_part(name)) :]
    starts = np.linspace(0, len(text) - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))


def rows_of(names: Sequence[str], draws: np.random.Generator, length: int = LENGTH) -> "Tensor":
    """int64 [B, S]: rows of training text, each of a domain that is drawn."""
    import torch

    rows = []
    for name in draws.choice(list(names), BATCH):
        text = training_part(str(name))
        start = draws.integers(0, len(text) - length)
        rows.append(text[start : start + length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def tune(
    model: Any,
    names: Sequence[str],
    steps: int,
    seed: int,
    *,
    parameters: Any = None,
    rate: float = RATE,
    length: int = LENGTH,
    **extra: Any,
) -> None:
    """Train a causal language model on some domains.

    Args:
        model: one of ours, or a dense one of transformers.
        names: the domains, as often drawn each.
        steps: optimiser steps.
        seed: draws the rows; the same seed gives the same ones.
        parameters: what is trained; all of the model's if not given.
        rate: the largest learning rate.
        length: bytes of a row.
        extra: further arguments of every call.
    """
    draws, outputs = np.random.default_rng(seed), []

    def loss_of(step: int) -> "Tensor":
        token_BS = rows_of(names, draws, length)
        outputs[:] = [model(token_BS, labels=token_BS, use_cache=False, **extra)]
        return outputs[0].loss

    def tell_routers() -> None:
        if hasattr(model.model, "post_step"):
            model.model.post_step([call.count_R for call in outputs[0].router_stats], BATCH * length)

    model.train()
    fit(model.parameters() if parameters is None else parameters, loss_of, steps, rate, tell_routers)
    model.eval()


def bits_per_byte(model: Any, name: str, **extra: Any) -> float:
    """Mean cross entropy on a domain's held-out rows, in bits."""
    import torch

    token_BS = held_out_rows(name)
    with torch.no_grad():
        logits = model(token_BS, use_cache=False, **extra).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), token_BS[:, 1:].flatten())
    return loss.item() / float(np.log(2))


def dense_model(inner_width: int, seed: int, **settings: Any) -> Any:
    """A small dense decoder over bytes: one expert of this width."""
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(seed)
    sizes = small_decoder(vocab_size=256, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=inner_width)
    return MoEForCausalLM(MoEConfig(**sizes | settings))
