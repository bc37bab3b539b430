"""The launches of a layer without running them: recorded on the meta device, or compiled side by side.

Shapes: T tokens, K experts per token, D model width, F expert width, E experts.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

from ..decode.rows import decode
from ..grouped.backward import Needs, backward
from ..grouped.forward import forward
from ..launching.launch import Launch
from ..launching.tiles import LayerTiles
from ..weights.activation import SWIGLU, Activation
from ..weights.quantise import BLOCK, QuantisedWeight
from ..weights.weights import ExpertWeights


def layer_launches(
    weights: ExpertWeights, num_tokens: int, top_k: int, dtype: torch.dtype, tiles: LayerTiles, *, trains: bool
) -> list[Launch]:
    """The launches of a layer, recorded on the meta device.

    Args:
        weights: experts on the meta device.
        num_tokens, top_k: T and K of the call, both at least 1.
        dtype: dtype of tokens and products.
        tiles: tile sizes of every matrix product.
        trains: forward and backward pass (of all but quantised weights); else the inference pass with the same tiles.
    """
    launches: list[Launch] = []
    x_TD, expert_TK, combine_TK = _inputs(weights, num_tokens, top_k, dtype)
    _, pre_NO, groups = forward(x_TD, expert_TK, combine_TK, weights, tiles, launches.append, saves=trains)
    if trains:
        is_frozen = isinstance(weights.up, QuantisedWeight)
        needs = Needs(up=not is_frozen, down=not is_frozen)
        backward(x_TD, x_TD, combine_TK, pre_NO, groups, weights, needs, tiles, launches.append)
    return launches


def decode_launches(
    weights: ExpertWeights, num_tokens: int, top_k: int, dtype: torch.dtype, processors: int = 1
) -> list[Launch]:
    """The launches of the decode path, recorded on the meta device.

    Args:
        weights, num_tokens, top_k, dtype: see `layer_launches`; T * K is at most `MAX_ROWS`.
        processors: of the device; with many, sums are split over inputs.
    """
    launches: list[Launch] = []
    decode(*_inputs(weights, num_tokens, top_k, dtype), weights, launches.append, processors)
    return launches


def _inputs(weights: ExpertWeights, num_tokens: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_TD = torch.empty(num_tokens, weights.up.shape[2], dtype=dtype, device="meta")
    expert_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device="meta")
    return x_TD, expert_TK, torch.empty(num_tokens, top_k, dtype=torch.float32, device="meta")


def meta_weights(
    width: int,
    features: int,
    num_experts: int,
    dtype: torch.dtype,
    *,
    quantised: str | None = None,
    has_bias: bool = False,
    is_transposed: bool = False,
    is_halves: bool = True,
    activation: Activation = SWIGLU,
) -> ExpertWeights:
    """Experts without storage.

    Args:
        width, features, num_experts: D, F and E, all at least 1.
        dtype: dtype of dense weights and biases.
        quantised: a format of `quantise` instead.
        has_bias, is_transposed, is_halves, activation: the layout; see `ExpertWeights`.
    """
    outputs = features * (2 if activation.gated else 1)

    def projection(num_outputs: int, num_inputs: int) -> Tensor | QuantisedWeight:
        if quantised is not None:
            return _meta_quantised(quantised, num_experts, num_outputs, num_inputs)
        if is_transposed:
            return torch.empty(num_experts, num_inputs, num_outputs, dtype=dtype, device="meta").transpose(1, 2)
        return torch.empty(num_experts, num_outputs, num_inputs, dtype=dtype, device="meta")

    def bias(num_outputs: int) -> Tensor | None:
        return torch.empty(num_experts, num_outputs, dtype=dtype, device="meta") if has_bias else None

    return ExpertWeights(
        projection(outputs, width),
        projection(width, features),
        bias(outputs),
        bias(width),
        activation,
        is_halves,
    )


def _meta_quantised(name: str, slots: int, outputs: int, inputs: int) -> QuantisedWeight:
    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    if name == "int4":
        scale = empty(slots, outputs, inputs // BLOCK)
        data = empty(slots, outputs, inputs // 2, dtype=torch.uint8)
        return QuantisedWeight("int4", data, scale, torch.empty_like(scale), 1, BLOCK, inputs)
    if name == "int8":
        data = empty(slots, outputs, inputs, dtype=torch.int8)
        return QuantisedWeight("int8", data, empty(slots, outputs, 1), None, 1, inputs, inputs)
    data = empty(slots, outputs, inputs, dtype=torch.float8_e4m3fn)
    if name == "fp8":
        return QuantisedWeight("fp8", data, empty(slots, outputs, 1), None, 1, inputs, inputs)
    scale = empty(slots, triton.cdiv(outputs, BLOCK), triton.cdiv(inputs, BLOCK))
    return QuantisedWeight("fp8", data, scale, None, BLOCK, BLOCK, inputs)


def compile_together(launches: Iterable[Launch]) -> None:
    """Compile launches for the present device on all processors; those that do not compile fail when they are run.

    Args:
        launches: of the meta device or of this one; nothing is run.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options())
