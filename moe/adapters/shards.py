"""Mixture of Shards: low-rank adapters of many matrices, put together from shards of a pool that all of them share.

Matrices of one kind (all query projections, say) have one pool for their A factors and one for their B factors. A row
of A is l shards one after another, a column of B likewise; which shards, an index of each matrix says:

    y = W x + alpha / r * B_m A_m x,    A_m[j] = concat_i pool_A[index_A[m, j, i]],    B_m likewise

Indices are drawn once and never trained (subset selection). A and B draw apart (pair dissociation), vectors are cut
into shards (vector sharding), and the last p rows of each matrix are shards of its own (shard privatization). The pools
hold as many numbers as LoRA of rank e for every matrix, while each matrix has rank r.

Source: Wang et al. 2024 (MoS), arXiv:2410.00938, section 3; draws without replacement, the order of shards, the start
and the scale as in the official code.

Shapes: I inputs, O outputs, L matrices of one kind, N shards of a pool, r = rank of a matrix, l = shards of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder, as families of transformers name them; the paper adapts all."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Sizes of the pools and of what is put together from them.

    Args:
        rank: r, of each matrix's adapter.
        budget_rank: e, of a LoRA with as many trained numbers.
        private_rank: p of the e, which belong to one matrix alone; 0 shares all. With p = e = r the adapters are LoRA.
        shards: l, of a vector; divides the inputs and outputs of every adapted matrix.
        is_dissociated: whether B draws shards of its own; otherwise those at the places of A's.
        alpha: outputs are scaled by alpha / r.
        seed: of the draws and of A's start.

    Raises:
        ValueError: if a number is out of range.
    """

    rank: int = 8
    budget_rank: int = 2
    private_rank: int = 1
    shards: int = 4
    is_dissociated: bool = True
    alpha: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.budget_rank < 1 or self.shards < 1:
            raise ValueError(
                f"rank, budget_rank and shards must be at least 1; got {self.rank}, {self.budget_rank}, {self.shards}"
            )
        if not 0 <= self.private_rank <= min(self.budget_rank, self.rank):
            raise ValueError(
                f"private_rank must lie in 0..{min(self.budget_rank, self.rank)} (rank and budget_rank); "
                f"got {self.private_rank}"
            )

    def expect_enough(self, num_matrices: int, kind: str) -> None:
        """Raise unless the shared part of a pool holds the shards that one matrix draws from it.

        Raises:
            ValueError: if it does not.
        """
        there = (self.budget_rank - self.private_rank) * num_matrices * self.shards
        drawn = (self.rank - self.private_rank) * self.shards
        if drawn > there:
            raise ValueError(
                f"a {kind} draws {drawn} shared shards, but {num_matrices} of them share {there}; lower rank, or raise "
                "budget_rank or private_rank"
            )


class ShardPool(nn.Module):
    """The pools of one kind of matrix, and which of their shards each matrix has.

    Args:
        num_matrices: L, which share the pools.
        inputs, outputs: I and O of each matrix; the plan's shards divide both.
        plan: ranks and shards.
        generator: its draws choose each matrix's shards and start the pools of A.
        dtype: in which the pools are trained.
    """

    def __init__(
        self,
        num_matrices: int,
        inputs: int,
        outputs: int,
        plan: ShardPlan,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.plan, N = plan, num_matrices * plan.budget_rank * plan.shards
        reach = inputs**-0.5  # Kaiming's uniform start with a = sqrt(5), of whole vectors
        start = torch.rand(N, inputs // plan.shards, generator=generator) * 2 * reach - reach
        self.a_shards = nn.Parameter(start.to(dtype))
        self.b_shards = nn.Parameter(torch.zeros(N, outputs // plan.shards, dtype=dtype))
        index_a = _draws(num_matrices, plan, generator)
        self.register_buffer("index_a", index_a)
        self.register_buffer("index_b", _draws(num_matrices, plan, generator) if plan.is_dissociated else index_a)

    def factors(self, matrix: int) -> tuple[Tensor, Tensor]:
        """A [r, I] and B [O, r] of one matrix."""
        a_rI = self.a_shards[self.index_a[matrix]].flatten(1)
        b_rO = self.b_shards[self.index_b[matrix]].flatten(1)
        return a_rI, b_rO.T

    def forward(self, x: Tensor, matrix: int) -> Tensor:
        """[..., O]: what the adapter adds to a matrix's output, from its input [..., I]."""
        a_rI, b_Or = self.factors(matrix)
        return linear(linear(x, a_rI), b_Or) * (self.plan.alpha / self.plan.rank)


class ShardAdapters(nn.Module):
    """The adapters of a model, in force from the call of `attach_shards` on until they are merged or removed.

    Its parameters are what is trained, its `state_dict` is what is kept of a tuned model; a pool stands under the name
    of its kind of matrix.

    Args:
        matrices: per kind, the modules that are adapted.
        plan: ranks and shards of every kind's pools.
    """

    def __init__(self, matrices: dict[str, list[nn.Linear]], plan: ShardPlan) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(plan.seed)
        self.pools = nn.ModuleDict()
        self._matrices, self._handles = matrices, []
        for kind, modules in matrices.items():
            plan.expect_enough(len(modules), kind)
            O, I = modules[0].weight.shape
            pool = ShardPool(len(modules), I, O, plan, generator, modules[0].weight.dtype)
            self.pools[kind] = pool.to(modules[0].weight.device)
            for number, module in enumerate(modules):
                self._handles.append(module.register_forward_hook(_adding(pool, number)))

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter into its matrix; the model is a plain one again, which computes what it did."""
        for kind, modules in self._matrices.items():
            pool = self.pools[kind]
            for number, module in enumerate(modules):
                a_rI, b_Or = pool.factors(number)
                module.weight.add_(b_Or @ a_rI, alpha=pool.plan.alpha / pool.plan.rank)
        self.remove()

    def remove(self) -> None:
        """The model is what it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def attach_shards(model: nn.Module, plan: ShardPlan, names: Sequence[str] = LINEAR_NAMES) -> ShardAdapters:
    """Freeze a model and adapt its linear layers of some names; at the start it computes what it did.

    Args:
        model: any model; experts whose matrices lie in one tensor per layer are no linear layers and stay as they are.
        plan: ranks and shards; each kind of matrix gets pools of these.
        names: last parts of the names of modules. Those of one name and one size share a pool.

    Raises:
        ValueError: if there is no such layer, or the plan does not fit one.
    """
    found: dict[tuple[str, int, int], list[nn.Linear]] = {}
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and name in names:
            found.setdefault((name, *module.weight.shape), []).append(module)
    if not found:
        raise ValueError(f"the model has no linear layers named {', '.join(names)}")
    for name, O, I in found:
        if I % plan.shards or O % plan.shards:
            raise ValueError(f"shards must divide inputs and outputs of {name}, {I} and {O}; got {plan.shards}")
    model.requires_grad_(False)
    several = {name for name, *_ in found if sum(name == other for other, *_ in found) > 1}
    return ShardAdapters(
        {f"{name}_{O}x{I}" if name in several else name: modules for (name, O, I), modules in found.items()}, plan
    )


def _draws(num_matrices: int, plan: ShardPlan, generator: torch.Generator) -> Tensor:
    """int64 [L, r, l]: shared shards, drawn without replacement for each matrix, then its private ones."""
    num_shared = (plan.budget_rank - plan.private_rank) * num_matrices * plan.shards
    own = plan.private_rank * plan.shards
    drawn = (plan.rank - plan.private_rank) * plan.shards
    rows = [
        torch.cat(
            [
                torch.randperm(num_shared, generator=generator)[:drawn],
                num_shared + own * matrix + torch.arange(own),
            ]
        )
        for matrix in range(num_matrices)
    ]
    return torch.stack(rows).unflatten(1, (plan.rank, plan.shards))


def _adding(pool: ShardPool, matrix: int) -> Any:
    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + pool(inputs[0], matrix)

    return add
