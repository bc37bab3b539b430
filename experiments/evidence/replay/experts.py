"""Random experts of one layer in a stored form: codes and scales are drawn, nothing is quantised.

Weights have a standard deviation of about 1 / sqrt(D). Rows of `down_proj` that would write to marked dimensions are
zero.

Shapes: E experts, D model width, F expert width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .size import GROUP, ReplaySize

BLOCK = 128
"""Rows and columns of a block of FP8 codes, as DeepSeek-V3's."""
ZERO_NIBBLES = 0x88
"""Two codes of compressed-tensors' int4 that mean 0: they are offset by 8."""
INT4_RMS = 4.6
"""Root mean square of -8 .. 7, each as likely."""
MXFP4_EXPONENTS = (119, 122)
"""Of scales: E2M1 codes have a root mean square of 2.9, and 2.9 x 2^-7 is about 1 / sqrt(2048)."""
NO_NAN = 0xF7
"""Clears a bit of each E4M3 code, so that none is NaN."""

Tensors = dict[str, torch.Tensor]
QUANTISATION: Mapping[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
            }
        },
    },
    "mxfp4": {"quant_method": "mxfp4"},
}
"""What config.json says of each form."""


def draw_pool(size: ReplaySize, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of one layer: bfloat16 weights, or bytes of codes."""
    count = num_experts * 3 * size.hidden * size.expert
    if size.form == "plain":
        return torch.empty(count, dtype=torch.bfloat16).normal_(0.0, size.hidden**-0.5, generator=generator)
    return torch.randint(0, 256, (count if size.form == "fp8" else count // 2,), dtype=torch.uint8, generator=generator)


def expert_tensors(
    size: ReplaySize, pool_EMW: torch.Tensor, marks: int, prefix: str, generator: torch.Generator
) -> Tensors:
    """The tensors of all experts of a layer, as a checkpoint of the form names them.

    Args:
        size: widths and form.
        pool_EMW: numbers of gate, up and down of each expert.
        marks: dimensions that no expert writes to.
        prefix: of their names, such as `model.layers.0.mlp.experts.`.
        generator: of scales.
    """
    if size.form == "mxfp4":
        return _fused_mxfp4(size, pool_EMW, marks, prefix, generator)
    store, tensors = _STORES[size.form], {}
    for number, matrices in enumerate(pool_EMW):
        for place, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            rows, columns = (size.hidden, size.expert) if name == "down_proj" else (size.expert, size.hidden)
            zero_rows = marks if name == "down_proj" else 0
            stored = store(matrices[place].view(rows, -1).clone(), columns, zero_rows, size.hidden**-0.5, generator)
            tensors |= {f"{prefix}{number}.{name}.{part}": tensor for part, tensor in stored.items()}
    return tensors


def _plain(weight: torch.Tensor, columns: int, zero_rows: int, deviation: float, generator: torch.Generator) -> Tensors:
    weight[:zero_rows] = 0
    return {"weight": weight}


def _fp8(codes: torch.Tensor, columns: int, zero_rows: int, deviation: float, generator: torch.Generator) -> Tensors:
    codes &= NO_NAN
    weight = codes.view(torch.float8_e4m3fn)
    grid = -(-len(codes) // BLOCK), -(-columns // BLOCK)
    rms = weight[zero_rows:].float().square().mean().sqrt()
    codes[:zero_rows] = 0
    spread = 0.5 + torch.rand(grid, generator=generator)
    return {"weight": weight, "weight_scale_inv": spread * (deviation / rms)}


def _int4(codes: torch.Tensor, columns: int, zero_rows: int, deviation: float, generator: torch.Generator) -> Tensors:
    rows = len(codes)
    codes[:zero_rows] = ZERO_NIBBLES
    spread = 0.5 + torch.rand(rows, columns // GROUP, generator=generator)
    scale = (spread * (deviation / INT4_RMS)).bfloat16()
    return {
        "weight_packed": codes.view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }


_STORES: Mapping[str, Callable[..., Tensors]] = {"plain": _plain, "fp8": _fp8, "int4": _int4}


def _fused_mxfp4(
    size: ReplaySize, pool_EMW: torch.Tensor, marks: int, prefix: str, generator: torch.Generator
) -> Tensors:
    """All experts in one tensor: rows of gate and up take turns, and every product has a bias."""
    count, (hidden, expert) = len(pool_EMW), (size.hidden, size.expert)
    up = pool_EMW[:, :2].reshape(count, 2 * expert, hidden // GROUP, GROUP // 2).clone()
    down = pool_EMW[:, 2].reshape(count, hidden, expert // GROUP, GROUP // 2).clone()
    down[:, :marks] = 0
    up_bias, down_bias = (
        torch.empty(count, rows, dtype=torch.bfloat16).normal_(0.0, hidden**-0.5, generator=generator)
        for rows in (2 * expert, hidden)
    )
    down_bias[:, :marks] = 0
    return {
        f"{prefix}gate_up_proj_blocks": up,
        f"{prefix}gate_up_proj_scales": _exponents(up, generator),
        f"{prefix}gate_up_proj_bias": up_bias,
        f"{prefix}down_proj_blocks": down,
        f"{prefix}down_proj_scales": _exponents(down, generator),
        f"{prefix}down_proj_bias": down_bias,
    }


def _exponents(blocks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(*MXFP4_EXPONENTS, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
