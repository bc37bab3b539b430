"""What ends the forward pass for few tokens: each token's sum over its experts and over splits, in routed order.

Shapes: T tokens, K experts per token, N = T * K routed rows in routed order, C slots, D model width, S splits.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..grouped.metadata import slot_arguments
from ..grouped.metadata_kernels import slot_of
from ..launching.launch import Launch, Run, arithmetic


@triton.jit
def combine_kernel(
    partial_ptr,
    expert_ptr,
    slot_ptr,
    combine_ptr,
    out_ptr,
    num_rows,
    num_experts,
    num_slots,
    width,
    top_k,
    num_splits,
    HAS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One token by one block of columns: sum over its rows and over splits."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    total = tl.zeros((BLOCK,), dtype=ACCUMULATE)
    for k in range(top_k):
        row = token * top_k + k
        slot = slot_of(expert_ptr, slot_ptr, row, row < num_rows, num_experts, num_slots, HAS_SLOTS)
        # spread before comparing: the interpreter has no mask of a scalar condition and a vector one
        is_computed = is_column & (slot + tl.zeros((BLOCK,), dtype=tl.int32) < num_slots)
        weight = tl.load(combine_ptr + row, mask=slot < num_slots, other=0).to(ACCUMULATE)
        for split in range(num_splits):
            ptr = partial_ptr + (split * num_rows + row) * width + column
            total += weight * tl.load(ptr, mask=is_computed, other=0)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=is_column)


def combine_rows(
    partial_SND: Tensor,
    expert_TK: Tensor,
    combine_TK: Tensor,
    slot_E: Tensor | None,
    num_experts: int,
    num_slots: int,
    y_TD: Tensor,
    run: Run,
) -> None:
    """Write `y[t] = sum over k and splits of weight[t, k] * partial[s, t * K + k]` of experts in slots."""
    num_tokens, width = y_TD.shape
    block = min(triton.next_power_of_2(width), 256)
    arguments = {
        "partial_ptr": partial_SND,
        **slot_arguments(expert_TK, slot_E, num_experts, num_slots),
        "combine_ptr": combine_TK,
        "out_ptr": y_TD,
        "width": width,
        "top_k": expert_TK.shape[1],
        "num_splits": len(partial_SND),
        "BLOCK": block,
        "ACCUMULATE": arithmetic(y_TD.dtype)["ACCUMULATE"],
    }
    run(Launch(combine_kernel, (num_tokens, triton.cdiv(width, block)), arguments))
