"""Each token gathers and sums its own rows: deterministic, no atomics, no zero-filled output.

Shapes: T tokens, K slots per token, N = T * K routed rows, D width.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import ACCUMULATORS, Launch, Run


@triton.jit
def gather_sum_kernel(
    y_ptr,
    position_ptr,
    combine_ptr,
    out_ptr,
    width,
    top_k,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One token by one block of columns."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    total = tl.zeros((BLOCK,), dtype=ACCUMULATE)
    for k in range(top_k):
        position = tl.load(position_ptr + token * top_k + k)
        row_ptr = y_ptr + position.to(tl.int64) * width
        # spread before comparing: the interpreter has no mask of a scalar condition and a vector one
        is_computed = is_column & (position + tl.zeros((BLOCK,), dtype=tl.int32) >= 0)
        y = tl.load(row_ptr + column, mask=is_computed, other=0).to(ACCUMULATE)
        if HAS_WEIGHT:
            weight = tl.load(combine_ptr + token * top_k + k, mask=position >= 0, other=0).to(ACCUMULATE)
            y = y * weight
        total += y
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * width + column, out, mask=is_column)


def gather_sum(y_ND: Tensor, position_N: Tensor, weight_TK: Tensor | None, out_TD: Tensor, run: Run) -> None:
    """Write `out[t] = sum over k of weight[t, k] * y[position[t, k]]`, skipping positions of -1.

    Args:
        y_ND: rows in grouped order, contiguous.
        position_N: place of each routed row, -1 for padding rows.
        weight_TK: combine weights, contiguous; None for 1.
        out_TD: receives the sums, contiguous.
        run: what to do with the launch.
    """
    num_tokens, width = out_TD.shape
    block = min(triton.next_power_of_2(width), 1024)
    arguments = {
        "y_ptr": y_ND,
        "position_ptr": position_N,
        "combine_ptr": weight_TK,
        "out_ptr": out_TD,
        "width": width,
        "top_k": len(position_N) // num_tokens,
        "HAS_WEIGHT": weight_TK is not None,
        "BLOCK": block,
        "ACCUMULATE": ACCUMULATORS.get(y_ND.dtype, tl.float32),
    }
    run(Launch(gather_sum_kernel, (num_tokens, triton.cdiv(width, block)), arguments))
