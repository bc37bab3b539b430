"""A matrix of a model that is held compressed, and looks like any other tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..formats.compression import expand


class CompressedWeight(torch.Tensor):
    """A bfloat16 matrix whose bytes are compressed; it is expanded for every operation but our product of one token.

    It cannot be written to: a change would be made to what was expanded, and lost.

    Args:
        compressed: as `compress` made it, followed by GUARD_BYTES.
        shape: of the matrix.
    """

    compressed: torch.Tensor

    @staticmethod
    def __new__(cls, compressed: torch.Tensor, shape: Sequence[int]) -> "CompressedWeight":
        weight: CompressedWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=torch.bfloat16, device=compressed.device
        )
        weight.compressed = compressed
        return weight

    def expanded(self) -> torch.Tensor:
        """The matrix, in memory of its own."""
        out_FD = torch.empty(self.shape, dtype=torch.bfloat16)
        expand(self.compressed, out_FD)
        return out_FD

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CompressedWeight({list(self.shape)}, {self.compressed.numel()} bytes)"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].compressed, args[0].shape)
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError(
                f"{func} would change a compressed weight, which only holds what was loaded; load the model without a "
                "compressed copy of its experts"
            )
        plain_args, plain_kwargs = tree_map_only(cls, cls.expanded, (tuple(args), dict(kwargs or {})))
        return func(*plain_args, **plain_kwargs)
