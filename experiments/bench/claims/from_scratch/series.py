"""Series: made ones, and those that matplotlib brings as sample data; Time-MoE against a dense forecaster.

Shapes: N rows (windows), S positions of a window.
"""

import csv
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..claim import Row, fit, small_decoder

if TYPE_CHECKING:
    from torch import Tensor

# toy sizes that a core trains in a minute, chosen once
CONTEXT, HORIZON, BATCH, RATE = 64, 32, 32, 2e-3
TRAINING_SHARE = 0.8
"""The first part of a recorded series is trained on, the rest forecast."""


@lru_cache(maxsize=1)
def recorded() -> dict[str, NDArray[np.float32]]:
    """Series that come with matplotlib: four EEG channels, a membrane current, logarithms of monthly stock prices."""
    from matplotlib.cbook import get_sample_data

    with get_sample_data("eeg.dat", asfileobj=True) as file:
        eeg = np.frombuffer(file.read(), np.float64).reshape(800, 4).T.astype(np.float32)
    with get_sample_data("membrane.dat", asfileobj=True) as file:
        membrane = np.frombuffer(file.read(), np.float32)
    with get_sample_data("Stocks.csv", asfileobj=True) as file:
        lines = [line.decode() if isinstance(line, bytes) else line for line in file]
    rows = list(csv.reader(line for line in lines if not line.startswith("#")))
    prices = np.array([float(row[1]) for row in rows[1:] if row and row[1]], np.float32)
    found = {f"EEG channel {number}": channel for number, channel in enumerate(eeg)}
    return found | {"membrane current": membrane[::4].copy(), "stock of IBM": np.log(prices)}


def made(count: int, length: int, draws: np.random.Generator) -> NDArray[np.float32]:
    """[N, length]: sums of a wave, a saw, a trend and noise, all drawn."""
    at = np.arange(length)
    period, phase = draws.uniform(6, 40, (count, 2, 1)), draws.uniform(0, 1, (count, 2, 1))
    turn = at / period + phase
    wave, saw = np.sin(2 * np.pi * turn[:, 0]), 2 * (turn[:, 1] % 1) - 1
    size = draws.uniform(0, 1, (count, 4, 1))
    trend = np.cumsum(draws.normal(0, 0.15, (count, length)), axis=1)
    noise = draws.normal(0, 0.1, (count, length))
    return (size[:, 0] * wave + size[:, 1] * saw + size[:, 2] * trend + size[:, 3] * noise).astype(np.float32)


def normalised(windows: NDArray[np.float32], seen: int) -> NDArray[np.float32]:
    """Windows in deviations of their first `seen` values."""
    mean, deviation = windows[:, :seen].mean(1, keepdims=True), windows[:, :seen].std(1, keepdims=True)
    return (windows - mean) / np.maximum(deviation, 1e-3)


def time_moe_rows(steps: int, seed: int) -> list[Row]:
    """Eight experts of which two, beside a gated shared one, and a dense forecaster of the same active size."""
    dense = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 72, "num_shared_experts": 1}
    sparse = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_shared_experts": 1}
    one_head = sparse | {"horizons": (1,)}
    variants: dict[str, dict[str, Any]] = {"time-moe": sparse, "dense, equal active": dense, "one head": one_head}
    return [{"variant": name, **_forecasts(steps, seed, dict(settings))} for name, settings in variants.items()]


def _forecasts(steps: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moe import Forecaster, MoEConfig

    torch.manual_seed(seed)
    horizons = settings.pop("horizons", (1, 8, 32))
    config = MoEConfig(**small_decoder(architecture="time_moe", vocab_size=1, balance_loss_weight=0.02) | settings)
    model = Forecaster(config, horizons).train()
    draws, series = np.random.default_rng(seed), recorded()
    trained = {name: values[: round(TRAINING_SHARE * len(values))] for name, values in series.items()}
    fit(model.parameters(), lambda step: model.loss(_batch(draws, trained)), steps, RATE)
    model.eval()
    tests = {"made": made(128, CONTEXT + HORIZON, np.random.default_rng(10_000 + seed))}
    for name in ("EEG channel 3", "membrane current", "stock of IBM"):
        # a context may reach into what was trained on, a forecast never
        tests[name] = _windows(series[name][len(trained[name]) - CONTEXT :])
    errors = {f"mse_{name.replace(' ', '_')}": _error(model, windows) for name, windows in tests.items()}
    return errors | {"active_parameters": _active(model)}


def _batch(draws: np.random.Generator, trained: dict[str, NDArray[np.float32]]) -> "Tensor":
    """Half of it made, half of it cut from recorded series."""
    import torch

    length, names = CONTEXT + HORIZON, list(trained)
    cut = []
    for name in draws.choice(names, BATCH // 2):
        start = draws.integers(0, len(trained[name]) - length)
        cut.append(trained[name][start : start + length])
    both = np.concatenate([made(BATCH - len(cut), length, draws), np.stack(cut)])
    return torch.from_numpy(normalised(both, CONTEXT))


def _windows(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Windows of which each begins one horizon after the one before."""
    length = CONTEXT + HORIZON
    starts = range(0, len(values) - length + 1, HORIZON)
    return np.stack([values[start : start + length] for start in starts])


def _error(model: Any, windows: NDArray[np.float32]) -> float:
    """Mean squared error of the forecast, in squared deviations of the context."""
    import torch

    window = torch.from_numpy(normalised(windows, CONTEXT))
    forecast = model.forecast(window[:, :CONTEXT], HORIZON)
    return ((forecast - window[:, CONTEXT:]) ** 2).mean().item()


def _active(model: Any) -> int:
    """Parameters of the decoder without the experts that a token does not visit."""
    config, idle = model.config, 0
    for layer in model.model.moe_layers:
        share = 1 - config.num_experts_per_tok / config.num_experts
        idle += round(sum(p.numel() for p in layer.experts.parameters()) * share)
    return sum(p.numel() for p in model.parameters()) - idle
