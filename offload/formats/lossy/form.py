"""LossyForm: what all forms have in common that no owner's checkpoint has and only a method of ours can write."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from routing.ground.hardware import Hardware

from ...checkpoint.experts import ExpertLayer
from ..form import MatrixEncoder
from ..packed import PackedForm


@dataclass(frozen=True, eq=False)
class LossyForm(PackedForm):
    """The experts of one layer, in fewer bits than they had: `offload/lowbit` writes them.

    Args:
        is_transposed: whether the model's parameters have inputs as rows.
    """

    is_transposed: bool = False

    linears: ClassVar[MatrixEncoder | None] = None
    reaches_gpu: ClassVar[bool] = False
    is_expanded: ClassVar[bool] = True

    @property
    def guard_bytes(self) -> int:
        """Parts are read to their end and no further."""
        return 0

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        share = self.expert_bytes / self.layer.plain_bytes
        is_multiplied = self.can_multiply(is_transposed=self.is_transposed)
        return hardware.stored_rate(2 * share) if is_multiplied else hardware.exact_bytes_per_s * share

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> bool:
        """Never by itself: such a form loses something, and has to be asked for."""
        return False

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> list[bytes]:
        raise NotImplementedError("quantising needs a method, see offload/lowbit")
