"""UltraMemV2: a memory layer beside the feed-forward network of every block.

o = W_out concat_c( sum_i  s_ic (P_i . W_pre x) V_ic ): no activation, raw scores, each core weighs its own part of the
values. More virtual places than values: a fixed shuffle sends `expand` of them to each value.

Source: Huang et al. 2025 (UltraMemV2), arXiv:2508.18756, section 3.

Shapes: T tokens, D model width, N places of the grid (`config.num_experts`), K chosen places per token over all heads,
M = sqrt(N).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from routing import Carry, MarginalStats, RoutingContext, TuckerKeyRouter, gather_dot, gather_sum

from ...layers.layer import RoutedLayer
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops, projection_flops
from ..body import Body
from .peer import shared_feed_forward, table_rows

# rounds of the Feistel network: more mix better and cost two table reads each; other numbers were not tried.
# Luby and Rackoff 1988: four rounds of random functions cannot be told from a random permutation
SHUFFLE_ROUNDS = 4


def ultramem(
    config: MoEConfig,
    *,
    num_heads: int = 1,
    key_width: int = 128,
    ranks: int = 2,
    cores: int = 2,
    pre_value_width: int = 64,
    value_width: int = 192,
    expand: int = 2,
    layers_per_table: int = 1,
    grid_loss: str = "none",
) -> Body:
    """An UltraMemV2 layer in every routed place; `num_experts` is N, a square, and `num_experts_per_tok` is K per head.

    Raises:
        ValueError: if cores do not divide the value width, or `expand` the grid.
    """
    sizes = config.router_sizes
    _expect_divisor("cores", cores, "value_width", value_width)
    _expect_divisor("expand", expand, "num_experts", sizes.num_experts)
    if layers_per_table < 1:
        raise ValueError(f"layers_per_table must be at least 1; got {layers_per_table}")
    layers: list[nn.Module] = []
    for layer in range(sizes.num_layers):
        router = TuckerKeyRouter(sizes, layer, num_heads, key_width, ranks, cores, grid_loss)  # type: ignore[arg-type]
        turn = layer % layers_per_table
        if turn == 0:
            table = ValueTable(sizes.num_experts // expand, cores, pre_value_width, value_width // cores)
        offset = turn * (sizes.num_experts // expand) // layers_per_table
        layers.append(UltraMemLayer(config, router, table, owns_table=turn == 0, offset=offset))
    return Body(layers=layers)


class ValueTable(nn.Module):
    """The pre-values and values of one or several layers.

    Args:
        num_values: rows of both tables.
        cores: parts of a value, each weighed by a core.
        pre_value_width, part_width: widths of a pre-value, and of one part of a value.
    """

    def __init__(self, num_values: int, cores: int, pre_value_width: int, part_width: int) -> None:
        super().__init__()
        self.num_rows, self.readers = num_values, 0
        self.pre_values = nn.Parameter(torch.empty(num_values, pre_value_width))
        # one tensor per core: parts of one tensor would need a second gradient of the whole
        self.values = nn.ParameterList(torch.empty(num_values, part_width) for _ in range(cores))


class Shuffle(nn.Module):
    """A fixed one-to-one map of the places of an M x M grid that needs only tables of M.

    Rounds of a Feistel network modulo M: the row moves by a random function of the column, then the other way round.

    Args:
        num_rows: M, rows and columns of the grid.
        seed: of the random functions.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.device("cpu"):
            move = torch.randint(num_rows, (SHUFFLE_ROUNDS, 2, num_rows), generator=generator)
        self.register_buffer("move", move)

    def forward(self, place: Tensor) -> Tensor:
        num_rows = self.move.shape[-1]
        # sums stay below one period more in each round; a table of so many is cheaper than remainders of integers, and
        # 32 bits are cheaper than 64, whose sums torch does one by one. A quotient of float64 is never rounded up to
        # the next number, for grids of up to 2^50 places
        period = self.move.int().repeat(1, 1, SHUFFLE_ROUNDS + 1)
        within = torch.arange(num_rows, device=place.device).repeat(SHUFFLE_ROUNDS + 1)
        row = (place.flatten().double() / num_rows).int()
        column = (place.flatten() - row.long() * num_rows).int()
        for by_column, by_row in period:
            row = row + by_column.index_select(0, column)
            column = column + by_row.index_select(0, row)
        return (within.index_select(0, row) * num_rows).add_(within.index_select(0, column)).view(place.shape)


class UltraMemLayer(RoutedLayer):
    """A TDQKR router and a table of values, beside a feed-forward network if the config has shared experts.

    Args:
        table: the values, perhaps shared with other layers.
        owns_table: whether checkpoints hold the table under this layer.
        offset: by how many values this layer's places are turned against those of the table's first layer.
    """

    def __init__(
        self, config: MoEConfig, router: TuckerKeyRouter, table: ValueTable, *, owns_table: bool, offset: int
    ) -> None:
        super().__init__()
        self.router = router
        self.shuffle = Shuffle(router.num_rows, seed=router.layer)
        if owns_table:
            self.experts = table
        self._shared_table = (table,)  # in a tuple, or torch would register it again
        table.readers += 1
        self.offset = offset
        value_width = sum(values.shape[1] for values in table.values)
        self.pre_proj = nn.Linear(config.hidden_size, table.pre_values.shape[1], bias=False)
        self.out_proj = nn.Linear(value_width, config.hidden_size, bias=False)
        self.shared = shared_feed_forward(config)

    @property
    def routers(self) -> list[nn.Module]:
        return [self.router]

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[MarginalStats]]:
        routing, carry, stats = self.router(x_TD, carry, context)
        core_weight = carry.get(self.router.CORE_WEIGHT)
        place_TK, _ = table_rows(routing, context)
        if context.is_valid_T is not None:  # padding keeps its scores in the carry
            core_weight = core_weight.masked_fill(~context.is_valid_T[:, None, None], 0.0)
        y_TD = self.out_proj(self._read(self.pre_proj(x_TD), self.value_rows(place_TK), core_weight).to(x_TD.dtype))
        return y_TD if self.shared is None else y_TD + self.shared(x_TD), carry.drop(self.router.CORE_WEIGHT), [stats]

    def value_rows(self, place_TK: Tensor) -> Tensor:
        """Which value each place of the grid reads."""
        return (self.shuffle(place_TK) + self.offset) % len(self._shared_table[0].pre_values)

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        widths = self.pre_proj.weight.shape[0] + self.out_proj.weight.shape[1]
        reads = 2 * self.router.num_heads * self.router.sizes.top_k * widths
        fixed = projection_flops(self.pre_proj) + projection_flops(self.out_proj) + projection_flops(self.shared)
        return LayerFlops(experts=passes * reads, shared=passes * fixed)

    def _read(self, pre: Tensor, row_TK: Tensor, core_weight: Tensor) -> Tensor:
        table = self._shared_table[0]
        with torch.autocast(pre.device.type, enabled=False):
            gate_TK = gather_dot(pre.to(table.pre_values.dtype), table.pre_values, row_TK)
            weight = gate_TK[..., None] * core_weight.to(gate_TK.dtype)
            parts = [gather_sum(weight[..., core], values, row_TK) for core, values in enumerate(table.values)]
        return torch.cat(parts, dim=-1)


def _expect_divisor(name: str, divisor: int, of: str, number: int) -> None:
    if divisor < 1 or number % divisor:
        raise ValueError(f"{name} must divide {of} ({number}); got {divisor}")
