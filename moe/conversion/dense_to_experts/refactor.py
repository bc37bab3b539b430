"""`expertier refactor`: a small dense Llama-type checkpoint as experts, a permanent part, and one router for all."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...model.decoder import MoEForCausalLM
from ...parts.text import carry_text_files, token_rows
from ..families import config_of_dense
from ..flags import flag
from ..layer_by_layer import loss_of, mean_loss
from ..opening import load_model, read_config
from ..staging import staged_folder
from .domain_masks import cluster, mean_activations, slice_layer
from .slicing import sliced_model, storage
from .training import Rounds, train_rounds

ALIGN = 8
"""Widths in channels: 16 bytes of bfloat16, which grouped matrix products need."""


@dataclass(frozen=True, kw_only=True)
class RouterSize:
    """How large the one router is.

    Args:
        router_heads: attention heads; must divide the width.
        router_width: of its residual stream; None takes an eighth of the model's.
    """

    router_heads: int = flag("Attention heads of the router.", default=4, min=1)
    router_width: int | None = flag("Width of the router; default: an eighth of the model's.", default=None)

    @property
    def options(self) -> dict[str, int]:
        """Those that were set, as options of the architecture."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RefactorPlan:
    """What to make of a dense model.

    Args:
        texts: one per domain, or any number if `domains` is given.
        domains: group the sequences of all texts into so many; None takes each text as one.
        keep: share of the hidden channels that a domain keeps, in (0, 1].
        sequence_length: tokens of a sequence, at least 2.
        tokens: bound on the tokens of all texts.
        rounds: training after slicing.
        router_options: `router_heads` and `router_width`, options of the architecture `readme`.

    Raises:
        ValueError: if a value is out of range, or one text is to be one domain.
    """

    texts: tuple[Path, ...] = flag("A text; repeat for more. Each is a domain by itself.", name="data", kind=list[Path])
    domains: int | None = flag("Group the texts' sequences into so many domains instead.", default=None)
    keep: float = flag("Share of the hidden channels that each domain keeps, in (0, 1].", default=0.5)
    sequence_length: int = flag("Tokens per sequence.", default=256, min=2)
    tokens: int = flag("Tokens of all texts, at most.", default=65_536, min=4)
    rounds: Rounds = field(default_factory=Rounds)
    router_options: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1]; got {self.keep:g}")
        if self.domains is None and len(self.texts) < 2:
            raise ValueError(
                "one text is one domain; give two or more with --data, or a number of clusters (--domains)"
            )
        if self.domains is not None and self.domains < 2:
            raise ValueError(f"domains must be at least 2; got {self.domains}")


def refactor(folder: Path, out: Path, plan: RefactorPlan, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Cut, train, and write a checkpoint of ours (architecture `readme`).

    Args:
        folder: a dense checkpoint: llama, mistral without a window, qwen2 or qwen3.
        out: folder to write; appears whole or not at all.
        plan: texts, domains and training.
        advance: is called after every optimiser step.

    Returns:
        Widths and storage, sequences per domain, and held-out losses: of the dense model, after slicing, after rounds.

    Raises:
        ValueError: if the model cannot be expressed, or the texts do not suffice.
    """
    config = read_config(folder)
    config_of_dense(config)
    rows = _rows(folder, config.vocab_size, plan)
    dense = load_model(folder).requires_grad_(False)
    train, held_out, text_B = _split(rows)
    activation_BLF = mean_activations(dense, train)
    domain_B = text_B if plan.domains is None else cluster(activation_BLF, plan.domains, seed=plan.rounds.seed)
    num_domains = int(domain_B.max()) + 1
    activation_ELF = torch.stack([activation_BLF[domain_B == domain].mean(dim=0) for domain in range(num_domains)])
    slices = [slice_layer(activation_EF, plan.keep, ALIGN) for activation_EF in activation_ELF.unbind(dim=1)]
    torch.manual_seed(plan.rounds.seed)
    model = sliced_model(dense, slices, plan.router_options)
    report: dict[str, Any] = {
        "domains": num_domains,
        "sequences_per_domain": torch.bincount(domain_B).tolist(),
        **storage(config.intermediate_size, slices),
        "loss_dense": _dense_loss(dense, held_out),
        "loss_sliced": mean_loss(model, held_out),
    }
    report["rounds"] = train_rounds(model, dense, slices, train, held_out, plan.rounds, advance)
    report["loss_after"] = mean_loss(model, held_out)
    _write(model, folder, out)
    return report


def _dense_loss(dense: Any, token_BS: Tensor) -> float:
    with torch.no_grad():
        return loss_of(dense.model(token_BS, use_cache=False).last_hidden_state, dense.lm_head, token_BS)


def _rows(folder: Path, vocab_size: int, plan: RefactorPlan) -> list[Tensor]:
    """int64 [B, S] of each text."""
    length, share = plan.sequence_length, plan.tokens // len(plan.texts)
    rows = [token_rows(folder, vocab_size, [text], length, share) for text in plan.texts]
    for text, found in zip(plan.texts, rows, strict=True):
        if found.shape[1] < length or len(found) < 2:
            raise ValueError(f"text {text} has {found.numel()} tokens; give two sequences of {length} or more")
    return rows


def _split(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences to train on, sequences held out (the last tenth of each text), and the text of each of the former."""
    held = [max(1, len(found) // 10) for found in rows]
    train = torch.cat([found[:-count] for found, count in zip(rows, held, strict=True)])
    held_out = torch.cat([found[-count:] for found, count in zip(rows, held, strict=True)])
    sizes = torch.tensor([len(found) - count for found, count in zip(rows, held, strict=True)])
    return train, held_out, torch.arange(len(rows)).repeat_interleave(sizes)


def _write(model: MoEForCausalLM, folder: Path, out: Path) -> None:
    with staged_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        carry_text_files(folder, unfinished)
