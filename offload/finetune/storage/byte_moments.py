"""AdamW's moments in one byte per number, with one float32 scale for a block of them. This is not exact.

A number is stored as a power of its code, so that small numbers of a block keep their order of magnitude. A mean has a
sign and the second power; a square has none and the fourth, and is never rounded down to 0, which would divide by it.

Source: Dettmers et al. 2022 (8-bit optimizers), arXiv:2110.02861, for blocks and for codes that are finer near 0; the
powers are ours.
"""

from dataclasses import dataclass

import torch

BLOCK = 256
"""Numbers that share a scale: 1.6 % more bytes. The paper takes 2,048; smaller blocks suffer less from one outlier."""


@dataclass(frozen=True)
class ByteCode:
    """How numbers become codes: `scale * sign * (|code| / largest)^power`.

    Args:
        largest: the code of a block's largest magnitude.
        power: 1 or more.
        least: the code of the smallest magnitude that is not 0.
    """

    largest: int
    power: int
    least: int

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of flat float32 numbers, a byte each, and the float32 scales of their blocks."""
        padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        scales = padded.abs().amax(1)
        part = padded.abs() / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        code = (part ** (1 / self.power) * self.largest).round().clamp(min=self.least) * padded.sign()
        return code.view(-1)[: len(values)].to(self.dtype).view(torch.uint8), scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The flat float32 numbers that codes stand for."""
        signed = codes.view(self.dtype).float()
        part = signed.sign() * (signed.abs() / self.largest) ** self.power
        return part * scales.repeat_interleave(BLOCK)[: len(codes)]

    @property
    def dtype(self) -> torch.dtype:
        """Codes up to 127 have a sign."""
        return torch.int8 if self.largest == 127 else torch.uint8


MEAN, SQUARE = ByteCode(127, 2, least=0), ByteCode(255, 4, least=1)
"""Of the first and the second moment."""


def num_blocks(count: int) -> int:
    """Blocks of so many numbers."""
    return -(-count // BLOCK)
