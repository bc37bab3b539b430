"""A decoder-only forecaster of series: one token per value, and one head per forecast length.

h = silu(w x) * (v x) embeds a value; head j maps a token to the next p_j values. A forecast of any length is made of
the longest heads that fit, each from the last token so far.

Source: Shi et al. 2024 (Time-MoE), arXiv:2409.16040, sections 3.1-3.2 and algorithm 1.

Shapes: B batch, S positions, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss, silu

from routing import RouterStats, auxiliary_loss

from ..parts.config import MoEConfig
from .decoder import MoEModel


class Forecaster(nn.Module):
    """Our decoder between a value embedding and several heads; any architecture, `time_moe` as published.

    Args:
        config: of the decoder; its vocabulary is not used, so `vocab_size` 1 is enough.
        horizons: forecast lengths of the heads, rising from 1.
        huber_delta: error from which on the loss is linear, in deviations of the series seen.

    Raises:
        ValueError: if the horizons do not rise from 1.
    """

    def __init__(self, config: MoEConfig, horizons: Sequence[int] = (1, 8, 32), huber_delta: float = 2.0) -> None:
        super().__init__()
        if list(horizons) != sorted(set(horizons)) or not horizons or horizons[0] != 1:
            raise ValueError(f"horizons must rise from 1, the head that every forecast can end with; got {horizons}")
        self.config, self.horizons, self.huber_delta = config, tuple(horizons), huber_delta
        self.gate, self.up = (nn.Linear(1, config.hidden_size, bias=False) for _ in range(2))
        self.model = MoEModel(config)
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, horizon, bias=False) for horizon in horizons)

    def forward(self, series_BS: Tensor) -> list[Tensor]:
        """Per head [B, S, horizon]: the values that follow each position."""
        hidden_BSD, _ = self._hidden(series_BS)
        return [head(hidden_BSD) for head in self.heads]

    def loss(self, series_BS: Tensor) -> Tensor:
        """Mean over heads of the Huber loss of all values that follow and are there, plus balance losses in training.

        Args:
            series_BS: normalised series, longer than the longest horizon.
        """
        if series_BS.shape[1] <= self.horizons[-1]:
            raise ValueError(f"series must be longer than {self.horizons[-1]} values; got {series_BS.shape[1]}")
        hidden_BSD, stats = self._hidden(series_BS[:, :-1])
        losses = []
        for head, horizon in zip(self.heads, self.horizons, strict=True):
            target = series_BS[:, 1:].unfold(1, horizon, 1)
            made = head(hidden_BSD[:, : target.shape[1]])
            losses.append(huber_loss(made, target, delta=self.huber_delta))
        loss = torch.stack(losses).mean()
        if not (self.training and stats):
            return loss
        weights = {"balance_weight": self.config.balance_loss_weight, "z_weight": self.config.z_loss_weight}
        return loss + auxiliary_loss(stats, **weights)

    @torch.no_grad()
    def forecast(self, series_BS: Tensor, length: int) -> Tensor:
        """[B, length]: the values that follow, in the units of the series.

        Each series is normalised by the mean and deviation of what was given. Every step reads all values so far.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1; got {length}")
        mean, deviation = series_BS.mean(dim=1, keepdim=True), series_BS.std(dim=1, keepdim=True, correction=0)
        seen_BS, end = (series_BS - mean) / deviation.clamp_min(1e-6), series_BS.shape[1] + length
        while (left := end - seen_BS.shape[1]) > 0:
            chosen = max(place for place, horizon in enumerate(self.horizons) if horizon <= left)
            hidden_BSD, _ = self._hidden(seen_BS)
            seen_BS = torch.cat([seen_BS, self.heads[chosen](hidden_BSD[:, -1])], dim=1)
        return seen_BS[:, -length:] * deviation.clamp_min(1e-6) + mean

    def _hidden(self, series_BS: Tensor) -> tuple[Tensor, list[RouterStats]]:
        value_BS1 = series_BS[..., None]
        output, _ = self.model(inputs_embeds=silu(self.gate(value_BS1)) * self.up(value_BS1), use_cache=False)
        return output.x_BSD, output.router_stats
