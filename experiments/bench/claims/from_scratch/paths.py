"""Short paths around an obstacle, as a policy would draw them: MoDE's denoisers, and denoisers trained apart.

A path runs from the left to the right in eight points, above or below the obstacle, in a wide or a narrow bend: four
modes, of which a plain regression would give the useless mean.

Shapes: N rows (paths), S positions (points), A = 2 coordinates.
"""

from typing import TYPE_CHECKING, Any

from ..claim import Row, fit, small_decoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# toy sizes that a core trains in a minute, chosen once; ten steps are MoDE's own number for sampling
POINTS, BATCH, HELD_OUT, SAMPLER_STEPS, RATE = 8, 64, 256, 10, 3e-3
# four ways round an obstacle, so that the mean of two is none of them
BENDS = (0.9, 0.45, -0.45, -0.9)
# what is trained, beside sizes
MODE = {"architecture": "mode", "router": "qwen3_moe", "vocab_size": 1}
DENSE = {"router": "olmoe", "num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 96}
"""One network as wide as the two experts of a token; `olmoe` weighs it by 1."""


def paths(count: int, generator: "torch.Generator") -> "Tensor":
    """float32 [N, S, 2]: the heights of the bend and a wobble are drawn; entries have a deviation near 0.5."""
    import torch

    along = torch.linspace(-1, 1, POINTS)
    bend = torch.tensor(BENDS)[torch.randint(len(BENDS), (count,), generator=generator)]
    height = bend[:, None] * (1 - along**2) + 0.03 * torch.randn(count, POINTS, generator=generator)
    return torch.stack([along.expand(count, -1) + 0.02 * torch.randn(count, POINTS, generator=generator), height], -1)


def energy_distance(one: "Tensor", other: "Tensor") -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of paths, 0 only for equal distributions.

    Source: Szekely and Rizzo 2013, "Energy statistics", equation 1.
    """
    import torch

    def mean_distance(a: "Tensor", b: "Tensor") -> float:
        return torch.cdist(a.flatten(1).double(), b.flatten(1).double()).mean().item()

    return 2 * mean_distance(one, other) - mean_distance(one, one) - mean_distance(other, other)


def mode_rows(steps: int, seed: int) -> list[Row]:
    """Experts by the noise level, by token and noise level, and one dense network of the same operations."""
    two_inputs = {"reads": "token_and_condition", "attends": True}
    variants: dict[str, dict[str, Any]] = {
        "experts by noise": {"architecture_options": {"attends": True}},
        "experts by token and noise": {"architecture_options": two_inputs},
        "dense, equal operations": {
            "architecture_options": {"attends": True},
            **DENSE,
        },
    }
    return [{"variant": name, **_policy(steps, seed, settings)} for name, settings in variants.items()]


def _policy(steps: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moe import Denoiser, MoEConfig, fused_experts, noise_levels, sample

    torch.manual_seed(seed)
    denoiser = Denoiser(MoEConfig(**small_decoder(**MODE) | settings), width=2)
    train_denoiser(denoiser, steps, seed)
    held_out = paths(HELD_OUT, torch.Generator().manual_seed(10_000 + seed))
    levels, noise = noise_levels(SAMPLER_STEPS), _noise(seed)
    drawn, routed = counted(denoiser, lambda: sample(denoiser, noise, levels))
    fused = None
    if settings["architecture_options"].get("reads", "condition") == "condition":
        with fused_experts(denoiser):
            sample(denoiser, noise, levels)
            fused = counted(denoiser, lambda: sample(denoiser, noise, levels))[1]
    return {
        "loss": held_out_loss(denoiser, held_out),
        "energy_distance": energy_distance(drawn, held_out),
        "mflop_per_path": routed / len(noise) / 1e6,
        "mflop_per_path_fused": None if fused is None else fused / len(noise) / 1e6,
    }


def train_denoiser(denoiser: Any, steps: int, seed: int, keep: Any = None) -> None:
    """Train on drawn paths, or on those of a batch that `keep` keeps."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def loss_of(step: int) -> "Tensor":
        clean = paths(BATCH, generator)
        return denoiser.loss(clean if keep is None else keep(clean), generator)

    denoiser.train()
    fit(denoiser.parameters(), loss_of, steps, RATE)
    denoiser.eval()


def held_out_loss(denoise: Any, held_out: "Tensor") -> float:
    """EDM's weighted squared error at the same drawn noise for all."""
    import torch

    from moe import noised

    noisy, sigma = noised(held_out, torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (denoise(noisy, sigma) - held_out) ** 2
    return ((sigma**2 + 0.25) / (sigma * 0.5) ** 2)[:, None, None].mul(error).mean().item()


def counted(model: Any, call: Any) -> tuple[Any, float]:
    """What a call gives, and the operations that torch counts in it; experts run as plain products for that."""
    from torch.utils.flop_counter import FlopCounterMode

    model.model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        made = call()
    return made, float(counter.get_total_flops())


def decentralised_rows(steps: int, seed: int) -> list[Row]:
    """One denoiser of all data, and four of its parts with a quarter of the steps each, under a router."""
    import torch

    from moe import DecentralisedDenoiser, Denoiser, MoEConfig, PartitionRouter, nearest_parts, noise_levels, sample

    dense = small_decoder(**MODE) | DENSE
    held_out, noise = paths(HELD_OUT, torch.Generator().manual_seed(10_000 + seed)), _noise(seed)
    levels, rows = noise_levels(SAMPLER_STEPS), []

    def judge(name: str, denoise: Any, cost: float) -> None:
        distance = energy_distance(sample(denoise, noise, levels), held_out)
        rows.append(
            {
                "variant": name,
                "loss": held_out_loss(denoise, held_out),
                "energy_distance": distance,
                "networks_per_call": cost,
            }
        )

    torch.manual_seed(seed)
    whole = Denoiser(MoEConfig(**dense), width=2)
    train_denoiser(whole, steps, seed)
    judge("one denoiser", whole, 1.0)
    data = paths(16 * BATCH, torch.Generator().manual_seed(20_000 + seed))
    partitions = {
        "clusters": nearest_parts(data.flatten(1), len(BENDS), seed=seed),
        "random parts": torch.randint(len(BENDS), (len(data),), generator=torch.Generator().manual_seed(seed)),
    }
    for name, part_N in partitions.items():
        count = int(part_N.max()) + 1
        members = []
        for part in range(count):
            own = data[part_N == part]
            member = Denoiser(MoEConfig(**dense), width=2)
            train_denoiser(member, steps // count, seed + part, _drawn_from(own, seed + part))
            members.append(member)
        router = PartitionRouter(MoEConfig(**dense | {"num_hidden_layers": 1}), 2, count)
        generator = torch.Generator().manual_seed(seed)

        def loss_of(step: int, router: Any = router, part_N: Any = part_N, draws: Any = generator) -> "Tensor":
            row = torch.randint(len(data), (BATCH,), generator=draws)
            return router.loss(data[row], part_N[row], draws)

        fit(router.parameters(), loss_of, steps // 4, RATE)
        router.eval()
        for used in (1, count):
            mixed = DecentralisedDenoiser(members, router, used)
            judge(f"{name}, {used} of {count} used", mixed, float(used))
    return rows


def _drawn_from(own: "Tensor", seed: int) -> Any:
    """A batch of the size that it is given, from these paths."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda clean: own[torch.randint(len(own), (len(clean),), generator=generator)]


def _noise(seed: int) -> "Tensor":
    import torch

    return torch.randn(HELD_OUT, POINTS, 2, generator=torch.Generator().manual_seed(30_000 + seed))
