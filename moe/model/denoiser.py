"""A denoiser of short sequences of vectors (actions, points): our decoder under the preconditioning of EDM.

D(x, s) = c_skip x + c_out F(c_in x, ln(s) / 4), so that D is the identity without noise. With the architecture `mode`
the noise level is what routers read (and attention, with `attends`); other architectures read it in a token alone.

Source: Karras et al. 2022 (EDM), arXiv:2206.00364, table 1; Reuss et al. 2024 (MoDE), arXiv:2412.12953, section 3.

Shapes: B batch, S positions, A width of a vector, D model width.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from routing import RouterStats, auxiliary_loss

from ..parts.config import MoEConfig
from .decoder import MoEModel

# ln of the noise level in training is normal with this mean and deviation, as in EDM
LOG_SIGMA_MEAN, LOG_SIGMA_DEVIATION = -1.2, 1.2


class NoiseEmbedding(nn.Module):
    """Sines and cosines of ln(sigma) / 4, then two linear maps.

    Args:
        width: D, of the embedding.
        num_waves: frequencies, from 1 up in octaves.
    """

    def __init__(self, width: int, num_waves: int = 8) -> None:
        super().__init__()
        self.num_waves = num_waves
        self.inner = nn.Linear(2 * num_waves, width)
        self.outer = nn.Linear(width, width)

    def forward(self, sigma_B: Tensor) -> Tensor:
        """[B, D]."""
        octaves = 2.0 ** torch.arange(self.num_waves, device=sigma_B.device, dtype=sigma_B.dtype)
        angle = (sigma_B.log() / 4)[:, None] * octaves
        return self.outer(torch.nn.functional.silu(self.inner(torch.cat([angle.sin(), angle.cos()], dim=-1))))


class NoisyTrunk(nn.Module):
    """A noise token before the vectors' tokens, through our decoder; the noise level is the condition of the call.

    Args:
        config: of the decoder; its vocabulary is not used, so `vocab_size` 1 is enough.
        width: A, of the vectors.
        out_width: what each position gives.
    """

    def __init__(self, config: MoEConfig, width: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.noise = NoiseEmbedding(config.hidden_size)
        self.in_proj = nn.Linear(width, config.hidden_size)
        self.model = MoEModel(config)
        self.out_proj = nn.Linear(config.hidden_size, out_width)

    def run(self, x_BSA: Tensor, sigma_B: Tensor) -> tuple[Tensor, list[RouterStats]]:
        """[B, S, out] of each vector's token, and the statistics of the routers."""
        noise_BD = self.noise(sigma_B)
        token_BSD = torch.cat([noise_BD[:, None], self.in_proj(x_BSA)], dim=1)
        output, _ = self.model(inputs_embeds=token_BSD, condition=noise_BD, use_cache=False)
        return self.out_proj(output.x_BSD[:, 1:]), output.router_stats


class Denoiser(NoisyTrunk):
    """The expected clean sequence of a noisy one.

    Args:
        config: of the decoder; its vocabulary is not used.
        width: A, of the vectors.
        data_deviation: standard deviation of the clean vectors' entries.
    """

    def __init__(self, config: MoEConfig, width: int, data_deviation: float = 0.5) -> None:
        super().__init__(config, width, width)
        if data_deviation <= 0:
            raise ValueError(f"data_deviation must be positive; got {data_deviation}")
        self.data_deviation = data_deviation

    def forward(self, x_BSA: Tensor, sigma_B: Tensor) -> Tensor:
        """[B, S, A] from noisy sequences and their noise levels, which are above 0."""
        return self._denoised(x_BSA, sigma_B)[0]

    def loss(self, clean_BSA: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """EDM's weighted squared error at drawn noise levels, plus balance losses while training."""
        noisy_BSA, sigma_B = noised(clean_BSA, generator)
        denoised_BSA, stats = self._denoised(noisy_BSA, sigma_B)
        weight_B = (sigma_B**2 + self.data_deviation**2) / (sigma_B * self.data_deviation) ** 2
        error = (weight_B[:, None, None] * (denoised_BSA - clean_BSA) ** 2).mean()
        if not (self.training and stats):
            return error
        weights = {"balance_weight": self.config.balance_loss_weight, "z_weight": self.config.z_loss_weight}
        return error + auxiliary_loss(stats, **weights)

    def _denoised(self, x_BSA: Tensor, sigma_B: Tensor) -> tuple[Tensor, list[RouterStats]]:
        sigma, data = sigma_B[:, None, None], self.data_deviation
        total = (sigma**2 + data**2).sqrt()
        inner_BSA, stats = self.run(x_BSA / total, sigma_B)
        return x_BSA * (data / total) ** 2 + inner_BSA * sigma * data / total, stats


def noised(clean_BSA: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Clean sequences with noise of a level drawn for each, and the levels [B]."""
    drawn_B = torch.randn(len(clean_BSA), generator=generator) * LOG_SIGMA_DEVIATION + LOG_SIGMA_MEAN
    sigma_B = drawn_B.exp().to(clean_BSA)
    noise_BSA = torch.randn(clean_BSA.shape, generator=generator).to(clean_BSA)
    return clean_BSA + sigma_B[:, None, None] * noise_BSA, sigma_B


def noise_levels(num_steps: int, *, largest: float = 80.0, smallest: float = 0.002, bend: float = 7.0) -> list[float]:
    """Falling noise levels of a sampler, the last one 0. Source: Karras et al. 2022, eq. 5."""
    if num_steps < 1 or not 0 < smallest < largest:
        raise ValueError(f"expected at least 1 step and 0 < smallest < largest; got {num_steps}, {smallest}, {largest}")
    ends = largest ** (1 / bend), smallest ** (1 / bend)
    inner = [(ends[0] + (ends[1] - ends[0]) * step / max(1, num_steps - 1)) ** bend for step in range(num_steps)]
    return [*inner, 0.0]


@torch.no_grad()
def sample(denoise: Callable[[Tensor, Tensor], Tensor], noise_BSA: Tensor, levels: Sequence[float]) -> Tensor:
    """[B, S, A]: Euler steps of the probability flow (DDIM) from unit noise down the levels.

    Args:
        denoise: a denoiser, or an ensemble of them.
        noise_BSA: standard normal.
        levels: falling, the last one 0.
    """
    x_BSA = noise_BSA * levels[0]
    for here, there in pairwise(levels):
        denoised_BSA = denoise(x_BSA, torch.full((len(x_BSA),), here).to(x_BSA))
        x_BSA = denoised_BSA + (x_BSA - denoised_BSA) * (there / here)
    return x_BSA
