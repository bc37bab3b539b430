"""How much the model's predictions suffer when the experts of one layer err: measured with noise in place of errors.

Shapes: T tokens, V vocabulary, D model width, L MoE layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checkpoint.experts import experts_modules

NOISE_SHARE = 0.01
"""Energy of the noise, of that of the experts' output: as much as four bits lose. Divergence grows in proportion to it
while it is small."""


def sensitivities(
    model: Any, sequences: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda layer: None
) -> list[float]:
    """Divergence (nats per token) for each unit of relative squared error in the experts' output of each layer.

    Args:
        model: of `load`.
        sequences: token ids to read; each is read once for each layer.
        progress: told the number of each layer.

    Returns:
        A number for each MoE layer.
    """
    modules = list(experts_modules(model).values())
    clean = [_log_probabilities(model, sequence) for sequence in sequences]
    found = []
    for layer, module in enumerate(modules):
        generator = torch.Generator().manual_seed(layer)
        hook = module.register_forward_hook(lambda _module, _in, out, made=generator: _with_noise(out, made))
        try:
            total = sum(
                float(divergence(before_TV, _log_probabilities(model, sequence)).sum())
                for before_TV, sequence in zip(clean, sequences, strict=True)
            )
        finally:
            hook.remove()
        found.append(total / sum(map(len, sequences)) / NOISE_SHARE)
        progress(layer)
    return found


def divergence(log_p_TV: torch.Tensor, log_q_TV: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of q from p for each token, in nats."""
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)


def _with_noise(out_TD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise_TD = torch.randn(out_TD.shape, generator=generator).to(out_TD.device)
    size_T1 = out_TD.float().square().mean(-1, keepdim=True).sqrt()
    return (out_TD.float() + NOISE_SHARE**0.5 * size_T1 * noise_TD).to(out_TD.dtype)


def _log_probabilities(model: Any, sequence: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = model(torch.tensor([list(sequence)], device=model.device), use_cache=False).logits[0]
    return logits_TV.float().log_softmax(-1).cpu()
