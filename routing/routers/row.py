"""RouterRow: what the rest of the project needs to know of a router; one row of `ROUTERS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..contract.module import RouterModule
from ..contract.router import RouterSizes
from .options import read_options


@dataclass(frozen=True, kw_only=True)
class Example:
    """A small use of a router, for the tests that every router must pass.

    Args:
        options: besides the row's own.
        top_k: K of 6 experts.
        zero_compute: kinds of its zero-compute experts.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    top_k: int = 2
    zero_compute: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RouterRow:
    """A router by its class, with the options that make it the one of its paper.

    Args:
        kind: its class, which says in `option_groups` what options there are; a JAX twin is found by the class's name.
        source: paper, with its arXiv number; empty if there is none.
        defaults: options with another default than the class has.
        sized_defaults: defaults that follow from the sizes, for options that are not given or None.
        build: makes the routers of all layers, if not the class's own `build`.
        balance_weight: coefficient of the balance loss that the paper gives, for comparisons; None takes the preset's.
        refusals: what the router cannot be combined with, and why: `pregate`, `mixture_of_recursions`.
        example: sizes and options that the contract tests use.
    """

    kind: type[RouterModule]
    source: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sized_defaults: Callable[[RouterSizes], Mapping[str, Any]] | None = None
    build: Callable[..., list[nn.Module]] | None = None
    balance_weight: float | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)
    example: Example = field(default_factory=Example)

    def __call__(self, sizes: RouterSizes, /, **options: Any) -> list[nn.Module]:
        """One router per MoE layer. Raises ValueError if an option is unknown or does not fit."""
        values = {**self.defaults, **options}
        if self.sized_defaults is not None:
            values |= {name: value for name, value in self.sized_defaults(sizes).items() if values.get(name) is None}
        build = self.kind.build if self.build is None else self.build
        return build(sizes, *read_options(self.kind.option_groups, values))
