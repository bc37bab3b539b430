"""RMSNorm whose weight follows the dtype of its input, so that autocast keeps the fused path."""

from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension. Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
