"""The layers that the kernel benchmark measures, and the routings it sends through them.

Shapes: T tokens, K experts per token, E experts, D model width, F expert width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from routing.ground.expect import expect_name
from routing.traces import RoutingTrace


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoE layer.

    Args:
        width: D, the width of tokens in and out.
        features: F, hidden width of one expert.
        num_experts: E; ids are 0..E-1.
        top_k: K, experts per token.
    """

    width: int
    features: int
    num_experts: int
    top_k: int

    def flops(self, num_tokens: int) -> int:
        """Of a forward pass: two per multiplication and addition; a backward pass has twice as many."""
        return 6 * num_tokens * self.top_k * self.features * self.width

    def least_saved_bytes(self, num_tokens: int, element_bytes: int) -> int:
        """Input and pre-activation: what a backward pass cannot do without."""
        return num_tokens * (self.width + 2 * self.top_k * self.features) * element_bytes

    def expert_bytes(self, element_bytes: float) -> float:
        """Of one expert's weights."""
        return 3 * self.width * self.features * element_bytes


# width, expert width, experts, experts per token, of the published configurations
SHAPES = {
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 8),
    "mixtral-8x7b": LayerShape(4096, 14336, 8, 2),
    "fine-grained-7b": LayerShape(1536, 256, 128, 8),
    "olmoe": LayerShape(2048, 1024, 64, 8),
    "gpt-oss-120b": LayerShape(2880, 2880, 128, 4),
    # 32 of 256 experts: the share of one rank of 8
    "deepseek-v3-slice": LayerShape(7168, 2048, 32, 8),
    "small-training": LayerShape(768, 256, 64, 4),
}
# the same, small enough for two cores: milliseconds to half a second per call
CPU_SHAPES = {
    "small": LayerShape(512, 256, 32, 4),
    "medium": LayerShape(1024, 512, 32, 4),
    "fine-grained": LayerShape(1024, 256, 128, 8),
}


def uniform(num_tokens: int, shape: LayerShape, generator: np.random.Generator) -> np.ndarray:
    """Every expert equally likely."""
    scores_TE = generator.random((num_tokens, shape.num_experts))
    return scores_TE.argpartition(shape.top_k - 1, axis=1)[:, : shape.top_k]


def zipf(num_tokens: int, shape: LayerShape, generator: np.random.Generator) -> np.ndarray:
    """Expert i wanted in proportion to 1 / (i + 1), without replacement (Gumbel top-k)."""
    log_weight_E = -np.log(np.arange(1, shape.num_experts + 1))
    scores_TE = log_weight_E + generator.gumbel(size=(num_tokens, shape.num_experts))
    return (-scores_TE).argpartition(shape.top_k - 1, axis=1)[:, : shape.top_k]


def one_hot(num_tokens: int, shape: LayerShape, generator: np.random.Generator) -> np.ndarray:
    """Every token wants the same experts: the worst case of imbalance."""
    return np.tile(np.arange(shape.top_k), (num_tokens, 1))


ROUTINGS: dict[str, Callable[[int, LayerShape, np.random.Generator], np.ndarray]] = {
    "uniform": uniform,
    "zipf": zipf,
    "one-hot": one_hot,
}


def replayed(trace: RoutingTrace, num_tokens: int, shape: LayerShape) -> np.ndarray:
    """Rows of a trace's middle layer, repeated as needed.

    Args:
        trace: recorded with the E and K of the shape.
        num_tokens: T of the call.
        shape: the layer that it stands for; E and K must be those of the trace.

    Returns:
        [T, K] expert ids, E for empty slots.

    Raises:
        ValueError: if the trace is of other sizes.
    """
    rows, layers, top_k = trace.expert_TLK.shape
    if (trace.num_experts, top_k) != (shape.num_experts, shape.top_k):
        raise ValueError(
            f"the trace has {trace.num_experts} experts, top-{top_k}; this shape wants {shape.num_experts}, "
            f"top-{shape.top_k}; choose the shape that the trace was recorded from"
        )
    expert_TK = trace.expert_TLK[np.arange(num_tokens) % rows, layers // 2].astype(np.int64)
    return np.where(expert_TK < 0, shape.num_experts, expert_TK)


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What a layer is given.

    Args:
        x_TD: normal numbers in the dtype of the layer.
        expert_TK: int64 expert ids, 0..E-1.
        combine_TK: float32 combine weights, rows sum to 1.
    """

    x_TD: Tensor
    expert_TK: Tensor
    combine_TK: Tensor

    @property
    def num_active(self) -> int:
        """Distinct experts in use."""
        return int(self.expert_TK.unique().numel())


def layer_input(
    expert_TK: np.ndarray, shape: LayerShape, dtype: torch.dtype, device: str, generator: np.random.Generator
) -> LayerInput:
    """Random tokens and weights for given expert ids."""
    num_tokens = len(expert_TK)
    x_TD = torch.from_numpy(generator.standard_normal((num_tokens, shape.width), dtype=np.float32))
    combine_TK = torch.from_numpy(generator.random(expert_TK.shape, dtype=np.float32))
    return LayerInput(
        x_TD.to(device, dtype),
        torch.from_numpy(np.ascontiguousarray(expert_TK, dtype=np.int64)).to(device),
        (combine_TK / combine_TK.sum(1, keepdim=True)).to(device),
    )


def experts_module(shape: LayerShape, dtype: torch.dtype, device: str, seed: int) -> torch.nn.Module:
    """Our experts with weights that keep activations of unit size."""
    from moe import Experts, MoEConfig

    config = MoEConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.features,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        experts = Experts(config)
    experts = experts.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        experts.gate_up_proj.normal_(std=shape.width**-0.5, generator=generator)
        experts.down_proj.normal_(std=shape.features**-0.5, generator=generator)
    return experts


def chosen(names: Sequence[str] | None, known: dict[str, LayerShape]) -> dict[str, LayerShape]:
    """The shapes of these names, all if none are given.

    Raises:
        ValueError: if a name is unknown.
    """
    for name in names or ():
        expect_name(name, known, "shape")
    return {name: shape for name, shape in known.items() if not names or name in names}
