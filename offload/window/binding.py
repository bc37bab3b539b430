"""Modules of a model whose weights come from a window: each is given them for the time of its forward pass.

Between two passes a streamed parameter holds no memory and is not a number anywhere, so that whatever uses it without
its module shows.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..prefetch.hashed_layers import token_ids_of
from .guests import Guest, is_row_reader
from .planning import WindowPlan

NO_COPY = "the weights of a streamed model are read for one model only; load it again instead of copying it"


class Holder(Protocol):
    """Who holds guests while they are computed."""

    def lend(self, number: int) -> Any:
        """A context that gives the weights of `plan.streamed[number]` by name."""
        ...

    def expect_rows(self, rows: Mapping[int, Sequence[int]]) -> None:
        """Start to read rows that a pass will look up; for each place in `plan.tables`, their numbers."""
        ...

    def rows(self, table: int, row_N: Sequence[int]) -> torch.Tensor:
        """Rows of `plan.tables[table]`; all numbers differ."""
        ...


def bind(model: nn.Module, plan: WindowPlan, holder: Holder) -> None:
    """Let the streamed modules of a model compute with what a holder gives them.

    Args:
        model: whose parameters in `plan.names` hold no memory.
        plan: what is streamed.
        holder: gives the weights.
    """
    for number, guest in enumerate(plan.streamed):
        module = model.get_submodule(guest.name)
        names = [parameter.name for parameter in guest.form.parameters]
        places = {name: _place(module, name) for name in names}
        module.forward = StreamedForward(holder, number, places, module.forward).forward  # type: ignore[method-assign]
    by_token: list[StreamedRows] = []
    for number, guest in enumerate(plan.tables):
        table = model.get_submodule(guest.name)
        (parameter,) = guest.form.parameters
        method = "look_up" if is_row_reader(table) else "forward"
        streamed = StreamedRows(holder, number, guest, getattr(table, parameter.name), getattr(table, method))
        setattr(table, method, streamed.forward)
        if method == "look_up":
            table.expect_rows = streamed.expect
            continue
        # torch compares it with the rows that it is given, and nothing else in a forward pass looks at it
        table.padding_idx = None  # type: ignore[assignment]
        if guest.is_by_token:
            by_token.append(streamed)
    if by_token:
        model.register_forward_pre_hook(partial(_expect_tokens, by_token), with_kwargs=True)


# a compiler would trace the reads
@torch.compiler.disable
def _expect_tokens(
    tables: Sequence["StreamedRows"], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a pass: start to read the rows of its tokens in all tables at once."""
    token_BS = token_ids_of(args, kwargs)
    if token_BS is None:
        return
    token_N = torch.unique(token_BS)
    counts = [streamed.guest.form.layer.num_experts for streamed in tables]
    # a table may lack tokens, for which its module has rules of its own
    rows = [token_N[(token_N >= 0) & (token_N < count)].tolist() for count in counts]
    tables[0].holder.expect_rows({each.number: row_N for each, row_N in zip(tables, rows, strict=True)})


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


@dataclass(eq=False)
class StreamedForward:
    """The forward pass of a guest."""

    holder: Holder
    number: int
    places: dict[str, tuple[nn.Module, str]]
    otherwise: Callable[..., Any]

    # a compiler would trace the exchange of the weights
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with its weights.

        Raises:
            RuntimeError: if gradients would need the weights later.
        """
        with self.holder.lend(self.number) as weights:
            parameters = {name: getattr(*place) for name, place in self.places.items()}
            with _exchanged([(parameter, weights[name]) for name, parameter in parameters.items()]):
                result = self.otherwise(*args, **kwargs)
        _expect_no_gradient(result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError(NO_COPY)


@dataclass(eq=False)
class StreamedRows:
    """The forward pass of a table: the rows that are asked for are read, and stand for the table."""

    holder: Holder
    number: int
    guest: Guest
    table: torch.Tensor
    otherwise: Callable[..., Any]

    @torch.compiler.disable
    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002  torch calls it so
        """What the table gives for `input`, ids of any shape."""
        row_N, place = torch.unique(input, return_inverse=True)
        _expect_rows(row_N, self.guest.form.layer.num_experts)
        with _exchanged([(self.table, self.holder.rows(self.number, row_N.tolist()))]):
            return self.otherwise(place.to(input.dtype), *args, **kwargs)

    @torch.compiler.disable
    def expect(self, row_N: torch.Tensor) -> None:
        """Start to read the rows of an input, of any shape, that will come in this pass."""
        self.holder.expect_rows({self.number: torch.unique(row_N).tolist()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError(NO_COPY)


@contextmanager
def _exchanged(pairs: Collection[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Within, these parameters hold these numbers."""
    before = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, weight in pairs:
            parameter.data = weight
        yield
    finally:
        for (parameter, _), empty in zip(pairs, before, strict=True):
            parameter.data = empty


def _expect_rows(row_N: torch.Tensor, count: int) -> None:
    if len(row_N) and not (int(row_N[0]) >= 0 and int(row_N[-1]) < count):
        raise IndexError(f"ids must be 0 to {count - 1}; got {int(row_N[0])} to {int(row_N[-1])}")


def _expect_no_gradient(result: Any) -> None:
    first = result[0] if isinstance(result, tuple) else result
    if isinstance(first, torch.Tensor) and first.requires_grad:
        raise RuntimeError(
            "gradients do not pass through streamed layers, whose weights are gone by then; run the model under "
            "torch.no_grad(), or train a model that fits in memory"
        )
