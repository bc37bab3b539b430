"""A matrix of a model that is held in a stored form, and looks like any other tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ...native.kernel_matrix import KernelMatrix, plain_matrix
from ..form import MatrixForm


class StoredWeight(torch.Tensor):
    """A bfloat16 matrix whose bytes are stored in a form; it is expanded for every operation but our own products.

    It cannot be written to: a change would be made to what was expanded, and lost.

    Args:
        stored: uint8, what `form` reads.
        shape: rows and columns of the matrix.
        form: what the bytes mean.
    """

    stored: torch.Tensor
    form: MatrixForm

    @staticmethod
    def __new__(cls, stored: torch.Tensor, shape: Sequence[int], form: MatrixForm) -> "StoredWeight":
        weight: StoredWeight = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.bfloat16, device=stored.device
        )
        weight.stored, weight.form = stored, form
        return weight

    def expanded(self) -> torch.Tensor:
        """The matrix, in memory of its own."""
        out_FD = torch.empty(self.shape, dtype=torch.bfloat16)
        self.form.expand(self.stored, out_FD)
        return out_FD

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredWeight":
        """Copies share the bytes, which nobody writes to."""
        return type(self)(self.stored, self.shape, self.form)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StoredWeight({list(self.shape)}, {self.stored.numel()} bytes)"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].shape, args[0].form)
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError(
                f"{func} would change a {args[0].form.name} weight, which only holds what was loaded; load the model "
                "without a packed copy that stores its linear layers, or as its plain copy (`expertier dequantise`)"
            )
        plain_args, plain_kwargs = tree_map_only(cls, cls.expanded, (tuple(args), dict(kwargs or {})))
        return func(*plain_args, **plain_kwargs)


def kernel_matrix(weight: torch.Tensor) -> KernelMatrix | None:
    """A contiguous bfloat16 matrix as our C multiplies it; None if it has to be expanded first."""
    if isinstance(weight, StoredWeight):
        return weight.form.kernel_matrix(weight.stored, (weight.shape[0], weight.shape[1]))
    return plain_matrix(weight)


def stored_bytes(weight: torch.Tensor) -> torch.Tensor:
    """What lies in memory for a matrix: its stored bytes, or itself."""
    return weight.stored if isinstance(weight, StoredWeight) else weight


def expanded(weight: torch.Tensor) -> torch.Tensor:
    """A matrix that any operation of torch may read directly."""
    return weight.expanded() if isinstance(weight, StoredWeight) else weight
