"""MoE-X: are its hidden units sparser and easier to read than those of dense networks and of a sparse autoencoder?

A unit is easy to read where it tells one byte from all others (`coverage`). The autoencoder has as many features as
MoE-X has hidden units in a layer, reads the input of a dense model's feed-forward, and keeps the k largest of a token.

Source: Yang et al. 2025 (MoE-X), arXiv:2503.07639, section 5; Gao et al. 2024, arXiv:2406.04093, for the autoencoder.

Shapes: T tokens, D model width, F hidden features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ....variants.architectures import ARCHITECTURE_VARIANTS
from ..claim import Row, fit, small_decoder
from ..domains import bits_per_byte, held_out_rows, rows_of, tune

if TYPE_CHECKING:
    from torch import Tensor

DOMAIN = "prose"
MIXTURE = small_decoder(vocab_size=256, num_experts=8)
"""Two of eight experts, as wide together as the dense model."""
MOEX = MIXTURE | ARCHITECTURE_VARIANTS["moe-x"](MIXTURE)
FEATURES = MOEX["num_experts"] * MOEX["moe_intermediate_size"]
KEPT = 32
"""Features of a token, a twentieth of all; not tuned."""
RATE = 3e-3
"""Of the autoencoders; not tuned."""
DENSE, AUTOENCODER = "dense SwiGLU", "dense SwiGLU, autoencoder"


def moex_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte, active hidden units and byte coverage at equal operations, and those of the autoencoder."""
    from ....compare.measures.hidden_units import hidden_metrics

    one = {"num_experts": 1, "num_experts_per_tok": 1}
    K = MIXTURE["num_experts_per_tok"]
    variants: dict[str, dict[str, Any]] = {
        "moe-x": MOEX,
        "top-2 SwiGLU": MIXTURE | {"router": "mixtral"},
        "dense ReLU": MOEX | one | {"moe_intermediate_size": K * MOEX["moe_intermediate_size"]},
        DENSE: MIXTURE | one | {"router": "mixtral", "moe_intermediate_size": K * MIXTURE["moe_intermediate_size"]},
    }
    rows, models = [], {}
    for name, settings in variants.items():
        models[name] = _trained(settings, steps, seed)
        found = hidden_metrics(models[name], held_out_rows(DOMAIN))
        rows.append({"variant": name, "bits_per_byte": bits_per_byte(models[name], DOMAIN), **found})
    return [*rows, {"variant": AUTOENCODER, **_encoded(models[DENSE], steps, seed)}]


def _trained(settings: dict[str, Any], steps: int, seed: int) -> Any:
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(seed)
    model = MoEForCausalLM(MoEConfig(**settings))
    tune(model, [DOMAIN], steps, seed)
    return model


class Autoencoder:
    """Features of one layer: the k largest of `ReLU(x W + b)`, and the input that they give back.

    Args:
        width: D, of the inputs that it gives back.
        seed: its draws start encoder and decoder alike.
    """

    def __init__(self, width: int, seed: int) -> None:
        import torch

        start_FD = torch.randn(FEATURES, width, generator=torch.Generator().manual_seed(seed)) * width**-0.5
        self.encoder_FD = start_FD.clone().requires_grad_()
        self.decoder_FD = start_FD.clone().requires_grad_()
        self.encoder_bias_F = torch.zeros(FEATURES, requires_grad=True)
        self.mean_D = torch.zeros(width, requires_grad=True)
        self.parameters = [self.encoder_FD, self.decoder_FD, self.encoder_bias_F, self.mean_D]

    def features(self, x_TD: "Tensor") -> "Tensor":
        """[T, F], at most k above 0 per token."""
        import torch

        value_TF = ((x_TD - self.mean_D) @ self.encoder_FD.T + self.encoder_bias_F).relu()
        kept = value_TF.detach().topk(KEPT, dim=-1).indices
        return value_TF * torch.zeros_like(value_TF).scatter(1, kept, 1.0)

    def __call__(self, x_TD: "Tensor") -> "Tensor":
        return self.features(x_TD) @ self.decoder_FD + self.mean_D


def _encoded(model: Any, steps: int, seed: int) -> dict[str, float]:
    """Autoencoders of all layers, trained on what the frozen model's feed-forwards read."""
    import torch

    from ....compare.measures.hidden_units import coverage

    layers = model.model.moe_layers
    encoders = [Autoencoder(model.config.hidden_size, seed + number) for number in range(len(layers))]
    draws = np.random.default_rng(seed)

    def inputs(token_BS: "Tensor") -> "list[Tensor]":
        seen: list[Tensor] = []

        def note(_number: int, x_TD: "Tensor") -> "Tensor":
            seen.append(x_TD)
            return x_TD

        with torch.no_grad(), replaced(layers, note):
            model(token_BS, use_cache=False)
        return seen

    def loss_of(step: int) -> "Tensor":
        seen = inputs(rows_of([DOMAIN], draws))
        losses = [((encoder(x_TD) - x_TD) ** 2).mean() for encoder, x_TD in zip(encoders, seen, strict=True)]
        return torch.stack(losses).sum()

    fit([parameter for encoder in encoders for parameter in encoder.parameters], loss_of, steps, RATE)
    token_BS = held_out_rows(DOMAIN)
    with torch.no_grad():
        units = [encoder.features(x_TD) for encoder, x_TD in zip(encoders, inputs(token_BS), strict=True)]
        with replaced(layers, lambda number, x_TD: encoders[number](x_TD)):
            bits = bits_per_byte(model, DOMAIN)
    active = sum((unit_TF > 0).float().sum(-1).mean().item() for unit_TF in units) / len(units)
    covered = [coverage(unit_TF, token_BS.flatten(), int(token_BS.max()) + 1) for unit_TF in units]
    return {
        "bits_per_byte": bits,
        "active_hidden": active / FEATURES,
        "active_units": active,
        "byte_coverage": sum(covered) / len(covered),
    }


@contextmanager
def replaced(layers: Any, change: "Callable[[int, Tensor], Tensor]") -> Iterator[None]:
    """Inside, each layer reads what `change` makes of its number and its input [T, D]."""

    def entering(number: int) -> Any:
        return lambda _layer, inputs: (change(number, inputs[0]), *inputs[1:])

    handles = [layer.register_forward_pre_hook(entering(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
