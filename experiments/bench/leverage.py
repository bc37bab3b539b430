"""The efficiency-leverage law of Ling: how much cheaper than a dense model a mixture of experts reaches the same loss.

Source: Tian et al. 2025 ("Towards Greater Leverage"), arXiv:2507.17702, eqs. 9-12 and table 4. The paper does not state
the bases of its logarithms: only log10 of the compute with log2 of the granularity reproduces its claims (above 7 at
A = 3.1 %, G = 12, 1e22 FLOPs; optimum near G = 12), so these are used here. No parity gate: nothing is timed.
"""

import math
from typing import Annotated

import typer

from ..train.description.config import TrainConfig
from ..train.description.description import described, run_size
from ..train.description.rate_laws import RATE_LAWS
from ..train.options import ConfigOption, SetOption

# the fit of table 4, named as in equations 9 to 12
A_EXPONENT, D_COMPUTE, GAMMA, BETA = 1.23, -7.61e-2, 1.67e-2, -1.17e-1
A_START, A_MAX = 1.63e-2, 5.28e16


def efficiency_leverage(activation: float, granularity: float, compute_flops: float) -> float:
    """Compute of a dense model over that of a mixture of experts with the same loss.

    Args:
        activation: A, share of the experts that a token visits, shared ones counted: `(E_a + E_s) / (E + E_s)`.
        granularity: G, `2 D / F` with the expert width F.
        compute_flops: C, training compute of the mixture: forward FLOPs per token without embeddings, times tokens.

    Raises:
        ValueError: if a value is out of range.
    """
    if not all(math.isfinite(value) for value in (activation, granularity, compute_flops)):
        raise ValueError(f"expected finite numbers; got {activation}, {granularity}, {compute_flops}")
    if not 0 < activation <= 1:
        raise ValueError(f"activation must lie in 0..1; got {activation}")
    if granularity <= 0 or compute_flops <= 1:
        raise ValueError(f"granularity must be positive and compute above 1 FLOP; got {granularity}, {compute_flops}")
    inverse_activation = 1 / (activation + 1 / (1 / A_START - 1 / A_MAX)) + 1 / A_MAX
    log_g = math.log2(granularity)
    exponent = A_EXPONENT + D_COMPUTE * math.log10(compute_flops) + GAMMA * log_g**2 + BETA * log_g
    return inverse_activation**-exponent


def best_granularity() -> float:
    """The granularity at which the law peaks, whatever the compute: `2 ** (-beta / (2 gamma))`."""
    return 2 ** (-BETA / (2 * GAMMA))


def leverage(
    activation: Annotated[
        float | None, typer.Option(help="Share of experts visited, shared ones counted, for instance 0.031.")
    ] = None,
    granularity: Annotated[float | None, typer.Option(help="2 D / F, for instance 12.")] = None,
    compute: Annotated[float | None, typer.Option(help="Training FLOPs of the mixture, for instance 1e22.")] = None,
    config_file: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """How many times the compute a dense model would need for the same loss, by Ling's law (log10 C, log2 G).

    Example: `expertier leverage --activation 0.031 --granularity 12 --compute 1e22`

    Of a run, with the learning rates and batches that laws advise: `expertier leverage --config run.yaml`
    """
    if config_file is not None or settings:
        config = described(config_file, settings or []).config
        shape = mixture_of(config)
        activation, granularity, compute = (
            shape[name] if given is None else given
            for name, given in (("activation", activation), ("granularity", granularity), ("compute", compute))
        )
        typer.echo(f"activation {activation:.4g}, granularity {granularity:.4g}, compute {compute:.4g} FLOPs")
        typer.echo("\n".join(advice(config)))
    if activation is None or granularity is None or compute is None:
        raise ValueError("give --activation, --granularity and --compute, or a run: --config run.yaml")
    value = efficiency_leverage(activation, granularity, compute)
    typer.echo(
        f"efficiency leverage {value:.2f} (log10 of the compute, log2 of the granularity; "
        f"the law peaks at granularity {best_granularity():.1f})"
    )


def mixture_of(config: TrainConfig) -> dict[str, float]:
    """What the law asks about a run: `activation`, `granularity` and `compute` in FLOPs."""
    from moe import MoEConfig

    model = MoEConfig(**config.model)
    visited = model.num_experts_per_tok + model.num_shared_experts
    return {
        "activation": min(1.0, visited / (model.num_experts + model.num_shared_experts)),
        "granularity": 2 * model.hidden_size / model.moe_intermediate_size,
        "compute": run_size(config).compute,
    }


def advice(config: TrainConfig) -> list[str]:
    """What each law advises for a run beside what the run does, a line each."""
    size = run_size(config)
    tokens = config.batch_size * config.accumulation * config.sequence_length
    lines = [f"this run: learning rate {config.learning_rate:.3g}, {tokens:,} tokens per step"]
    for name, law in RATE_LAWS.items():
        rates = law(size)
        lines.append(f"{name}: learning rate {rates.learning_rate:.3g}, {rates.batch_tokens:,.0f} tokens per step")
    return lines
