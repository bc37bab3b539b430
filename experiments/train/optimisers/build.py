"""The optimiser of a run, by name: which parameter is moved by what."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from moe import MoEForCausalLM

from ..description.config import TrainConfig
from .bank_muon import BankMuon


def build_optimizer(model: MoEForCausalLM, config: TrainConfig) -> "AdamW | Together":
    """The optimiser that a run names, over all parameters of a model."""
    return OPTIMIZERS[config.optimizer](model, config)


class Together:
    """Optimisers that move different parameters of one model, stepped and saved as one.

    Args:
        parts: by a name that its state is saved under.
    """

    def __init__(self, parts: dict[str, Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(part.param_groups for part in self.parts.values()))

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError or ValueError if the state is of other optimisers or other parameters."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def _adamw(model: MoEForCausalLM, config: TrainConfig) -> AdamW:
    return _adamw_of(model.parameters(), config)


def _adamw_of(parameters: Iterable[nn.Parameter], config: TrainConfig) -> AdamW:
    """AdamW; matrices decay, norms and biases do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _muon(model: MoEForCausalLM, config: TrainConfig) -> Together:
    """Muon for the matrices between embedding and head; AdamW for those two, routers, norms and what is no matrix.

    Gate and up projections of an expert lie in one matrix, and are two for Muon.
    """
    kept = {*map(id, model.get_input_embeddings().parameters()), *map(id, model.lm_head.parameters())}
    kept |= {id(parameter) for router in model.model.routers for parameter in router.parameters()}
    moved = {name: p for name, p in model.named_parameters() if id(p) not in kept and p.ndim >= 2}
    banks = {name: p for name, p in moved.items() if p.ndim > 2}
    halves = [p for name, p in banks.items() if name.endswith("gate_up_proj")]
    whole = [p for name, p in banks.items() if not name.endswith("gate_up_proj")]
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "momentum": config.muon_momentum}
    matrices = [p for p in moved.values() if p.ndim == 2]
    ids = {id(p) for p in moved.values()}
    parts: dict[str, Optimizer] = {
        "adamw": _adamw_of((p for p in model.parameters() if id(p) not in ids), config),
        "muon": Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings),
    }
    if banks:
        groups = [{"params": halves, "parts": 2}, {"params": whole}]
        parts["bank_muon"] = BankMuon([group for group in groups if group["params"]], **settings)
    return Together(parts)


OPTIMIZERS: dict[str, Callable[[MoEForCausalLM, TrainConfig], Any]] = {"adamw": _adamw, "muon": _muon}
