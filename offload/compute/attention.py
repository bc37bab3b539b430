"""Attention of single tokens: what surrounds its products, and keys that are not copied once for each head of queries.

`eager` attention, which families with sinks or soft caps have to use, repeats keys and values for every head that
shares them: at 2,048 positions of 8 heads for 64 that copies 32 MB for each token and layer. Here the heads that share
keys are the rows of one product.

Shapes: H heads of queries, J heads of keys and values, R = H / J heads that share them, S positions, W head width,
M rows and N columns of a matrix that a row is multiplied by.
"""

from types import FunctionType
from typing import Any

import torch
from torch import nn

from .matvec import is_in_memory
from .rebinding import ReboundForward, plain_function, rebound
from .rotary import TokenRotary

ROTARY, EAGER, REPEAT = "apply_rotary_pos_emb", "eager_attention_forward", "repeat_kv"


def quicken_attention(model: nn.Module) -> None:
    """Let the attention modules of a model use our helpers for single tokens, where they name the usual ones."""
    products = SharedProducts()
    functions: dict[Any, FunctionType] = {}
    for module in model.modules():
        forward = plain_function(type(module).forward, {ROTARY, EAGER})
        if forward is None or "forward" in vars(module):
            continue
        if forward not in functions:
            functions[forward] = rebound(forward, _helpers(forward, products))
        own = ReboundForward(module, functions[forward], module.forward)
        module.forward = own.forward  # type: ignore[method-assign]


def _helpers(forward: FunctionType, products: "SharedProducts") -> dict[str, Any]:
    helpers: dict[str, Any] = {}
    if callable(rotary := forward.__globals__.get(ROTARY)):
        helpers[ROTARY] = TokenRotary(rotary)
    eager = plain_function(forward.__globals__.get(EAGER), {REPEAT})
    if eager is not None:
        shared = rebound(eager, {REPEAT: lambda states, times: Repeated(states, times, products)})

        def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            is_shared = not module.training and all(map(_is_shared_token, (query, key, value)))
            chosen = shared if is_shared and query.shape[2] == 1 < query.shape[1] // key.shape[1] else eager
            return chosen(module, query, key, value, *args, **kwargs)

        helpers[EAGER] = attend
    return helpers


def _is_shared_token(states: torch.Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and states.requires_grad
    return is_in_memory(states) and states.dtype == torch.bfloat16 and states.shape[0] == 1 and not needs_gradient


class Repeated:
    """Keys or values `[1, J, S, W]` that stand for themselves repeated, `[1, H, S, W]`.

    A product with a single token uses them as they are. Everything else repeats them first.
    """

    def __init__(
        self, states: torch.Tensor, times: int, products: "SharedProducts", *, is_turned: bool = False
    ) -> None:
        self._states, self._times, self._products, self._is_turned = states, times, products, is_turned

    def transpose(self, first: int, second: int) -> Any:
        if self._is_turned or {first, second} not in ({2, 3}, {-2, -1}):
            return self.repeated().transpose(first, second)
        return Repeated(self._states, self._times, self._products, is_turned=True)

    def repeated(self) -> torch.Tensor:
        """What `repeat_kv` of transformers gives, transposed if that was asked for."""
        _, heads, positions, width = self._states.shape
        wide = self._states[:, :, None].expand(1, heads, self._times, positions, width)
        plain = wide.reshape(1, heads * self._times, positions, width)
        return plain.transpose(2, 3) if self._is_turned else plain

    def matrix(self) -> torch.Tensor:
        """`[J, M, N]`, one for each head of keys."""
        return self._states[0].transpose(1, 2) if self._is_turned else self._states[0]

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device"):
            return getattr(self._states, name)
        return getattr(self.repeated(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul and len(args) == 2 and not kwargs and isinstance(args[1], Repeated):
            row, other = args
            is_token = isinstance(row, torch.Tensor) and row.dim() == 4 and row.shape[0] == row.shape[2] == 1
            if is_token and row.dtype == other._states.dtype:
                return other._products.multiply(row, other)
        return func(*map(_plain, args), **{name: _plain(value) for name, value in (kwargs or {}).items()})


def _plain(value: Any) -> Any:
    return value.repeated() if isinstance(value, Repeated) else value


class SharedProducts:
    """Products of one row for each head with matrices that several heads share.

    The rows of heads that share a matrix go into one product where that gives the bits of one product for each. Which
    order torch sums in depends on all sizes, with no rule that we know: so each size is tried when it first occurs,
    on sums that are pure rounding. All layers of a model have the same sizes, and so try once for each length.
    """

    def __init__(self) -> None:
        self._agrees: dict[tuple[int, ...], bool] = {}
        self._random = torch.empty(0, dtype=torch.bfloat16)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedProducts":
        """Copies of a model share it: it holds nothing but what was tried."""
        return self

    def multiply(self, row_1H1M: torch.Tensor, shared: Repeated) -> torch.Tensor:
        """`row @ shared`, `[1, H, 1, N]`."""
        matrix_JMN = shared.matrix()
        layout = (row_1H1M.stride(1), shared._states.stride(1), shared._is_turned)
        key = (*layout, shared._times, *matrix_JMN.shape, torch.get_num_threads())
        if key not in self._agrees:
            self._agrees[key] = self._try(row_1H1M, shared)
        return _together(row_1H1M, matrix_JMN) if self._agrees[key] else torch.matmul(row_1H1M, shared.repeated())

    def _try(self, like_1H1M: torch.Tensor, shared: Repeated) -> bool:
        """Whether both ways agree on operands whose products cancel: every term comes a second time, negative.

        They lie in memory as the real ones do.
        """
        row_1H1M = self._normal_like(like_1H1M)
        trial = Repeated(self._normal_like(shared._states), shared._times, self, is_turned=shared._is_turned)
        matrix_JMN = trial.matrix()
        half = matrix_JMN.shape[1] // 2
        row_1H1M[..., half : 2 * half] = row_1H1M[..., :half]
        matrix_JMN[:, half : 2 * half] = -matrix_JMN[:, :half]
        return torch.equal(_together(row_1H1M, matrix_JMN), torch.matmul(row_1H1M, trial.repeated()))

    def _normal_like(self, like: torch.Tensor) -> torch.Tensor:
        """Random numbers, always the same ones for a shape."""
        count = like.numel()
        if self._random.numel() < count:
            # twice as many as now: lengths grow by one, and new numbers take longer than the product
            generator = torch.Generator().manual_seed(0)
            self._random = torch.randn(2 * count, generator=generator).bfloat16()
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return made.copy_(self._random[:count].view(like.shape))


def _together(row_1H1M: torch.Tensor, matrix_JMN: torch.Tensor) -> torch.Tensor:
    heads, shares = row_1H1M.shape[1], len(matrix_JMN)
    rows_JRM = row_1H1M.reshape(shares, heads // shares, row_1H1M.shape[3])
    return torch.bmm(rows_JRM, matrix_JMN).view(1, heads, 1, matrix_JMN.shape[2])
