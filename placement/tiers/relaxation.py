"""The linear relaxation of a tier model over classes of alike ways, and the bound that its dual proves.

Alike GPUs, and alike nodes, may be exchanged, so a solution of the relaxation that treats them alike is as good as any.
The programme therefore has one variable per expert and class of ways, not per way.
The bound does not rest on that, nor on the solver: with any multipliers mu >= 0 of chains, which sum to the weight of
their scenario within each layer and group, and any prices lambda >= 0 of memory,

    bound = sum over experts of min over ways of (sum over chains of mu cost + lambda bytes) - sum over pools of
            lambda capacity

is below every plan's seconds. It is computed from the full model with the multipliers that the solver returned.

Shapes: W scenarios, L layers, E experts, Y ways, H chains, U memory pools, Q classes, C kinds of cost.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .model import TierModel
from .ways import TRAFFIC, WORK

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
MOST_GROUPS = 4000  # experts or groups of them in the programme: 14,848 took 77 s, 3,712 a tenth of it


@dataclass(frozen=True, kw_only=True, eq=False)
class Multipliers:
    """Dual values: of each layer's chains, and seconds per byte of each memory pool.

    Args:
        chain_WLH: not negative; each scenario's sum to its weight within every layer and group of chains.
        price_U: not negative.
    """

    chain_WLH: Float
    price_U: Float


@dataclass(frozen=True, kw_only=True, eq=False)
class Relaxed:
    """What the relaxation gives.

    Args:
        share_LEQ: part of each expert on each class of ways.
        multipliers: for the bound.
        bound: valid lower bound on the seconds of any plan.
    """

    share_LEQ: Float
    multipliers: Multipliers
    bound: float


def relax(model: TierModel, time_limit_s: float) -> Relaxed:
    """Solve the relaxation by HiGHS; the bound is evaluated apart from it, on the whole model.

    Large models are solved with groups of experts of nearly equal costs in each layer. Their multipliers are nearly
    those of the whole model, and valid for it as any are.

    Args:
        model: what is placed where.
        time_limit_s: seconds; a run that ends by it still gives a valid bound, from even multipliers.
    """
    from scipy.optimize import linprog

    group_LE = _groups(model)
    unit_s = float(model.cost_WLEC.max()) or 1.0  # the solver's tolerances are absolute, and steps take microseconds
    programme = _Programme(_grouped(replace(model, cost_WLEC=model.cost_WLEC / unit_s), group_LE))
    done: Any = linprog(
        programme.cost,
        A_ub=programme.upper,
        b_ub=programme.limit,
        A_eq=programme.sums,
        b_eq=np.ones(programme.sums.shape[0]),
        method="highs",
        options={"time_limit": max(time_limit_s, 0.1)},
    )
    multipliers = programme.multipliers(done.ineqlin.marginals, unit_s) if done.status == 0 else even_multipliers(model)
    share_LEQ = programme.shares(done.x) if done.status == 0 else programme.even_shares()
    share_LEQ = np.take_along_axis(share_LEQ, group_LE[:, :, None], axis=1)
    return Relaxed(share_LEQ=share_LEQ, multipliers=multipliers, bound=dual_value(model, multipliers))


def _groups(model: TierModel) -> Integer:
    """Number of each expert's group; in a layer, experts next to each other by cost share a group."""
    L, E, _ = model.shape
    size = -(-L * E // MOST_GROUPS)
    scale_C = np.maximum(model.cost_WLEC.max(axis=(0, 1, 2)), 1e-300)
    cost_LE = (model.cost_WLEC / scale_C).sum(axis=(0, 3))
    cost_LE[np.arange(E) >= model.experts_L[:, None]] = -1
    rank_LE = np.argsort(np.argsort(-cost_LE, axis=1, kind="stable"), axis=1)
    return np.asarray(rank_LE // size)


def _grouped(model: TierModel, group_LE: Integer) -> TierModel:
    """The model with one expert per group, which costs and weighs as much as its members together."""
    L, E, _ = model.shape
    real_LE = np.arange(E) < model.experts_L[:, None]
    groups = int(group_LE.max()) + 1
    cost = np.zeros((len(model.weight_W), L, groups, model.cost_WLEC.shape[3]))
    size_LE = np.zeros((L, groups))
    layer_LE = np.broadcast_to(np.arange(L)[:, None], group_LE.shape)
    np.add.at(size_LE, (layer_LE[real_LE], group_LE[real_LE]), 1)
    for w in range(len(cost)):
        np.add.at(cost[w], (layer_LE[real_LE], group_LE[real_LE]), model.cost_WLEC[w][real_LE])
    return replace(model, cost_WLEC=cost, experts_L=np.full(L, groups), members_LE=size_LE)


def dual_value(model: TierModel, multipliers: Multipliers) -> float:
    """The bound that the multipliers prove; they are checked."""
    ways = model.ways
    chain_WLH = multipliers.chain_WLH
    if np.any(chain_WLH < 0) or np.any(multipliers.price_U < 0):
        raise ValueError("multipliers must not be negative")
    for group in (WORK, TRAFFIC):
        total_WL = chain_WLH[:, :, ways.group_H == group].sum(axis=2)
        if (ways.group_H == group).any() and np.any(total_WL > model.weight_W[:, None] * (1 + 1e-9)):
            raise ValueError("the multipliers of a layer exceed the weight of its scenario")
    is_open_U = np.isfinite(ways.capacity_U)
    if np.any(multipliers.price_U[~is_open_U] > 0):
        raise ValueError("memory without a limit has no price")
    best_LE = priced_LEY(model, multipliers).min(axis=2)
    real_LE = np.arange(best_LE.shape[1]) < model.experts_L[:, None]
    return float(best_LE[real_LE].sum() - (multipliers.price_U[is_open_U] * ways.capacity_U[is_open_U]).sum())


def priced_LEY(model: TierModel, multipliers: Multipliers) -> Float:
    """Cost of each expert on each way at the multipliers, memory included."""
    ways = model.ways
    unit_WLYC = np.einsum("wlh,yhc->wlyc", multipliers.chain_WLH, ways.use_YHC)
    cost_LEY = np.einsum("wlec,wlyc->ley", model.cost_WLEC, unit_WLYC, optimize=True)
    price_LY = model.bytes_L[:, None] * multipliers.price_U[ways.pool_Y]
    return np.asarray(cost_LEY + price_LY[:, None, :])


def even_multipliers(model: TierModel) -> Multipliers:
    """Valid for any model: every chain of a group counts alike, memory costs nothing."""
    group_H = model.ways.group_H
    count_H = np.array([(group_H == group).sum() for group in group_H])
    chain_WLH = np.broadcast_to(
        model.weight_W[:, None, None] / count_H, (len(model.weight_W), len(model.bytes_L), len(group_H))
    )
    return Multipliers(chain_WLH=chain_WLH.copy(), price_U=np.zeros(len(model.ways.capacity_U)))


class _Programme:
    """The relaxation as arrays; columns are shares [L, E, Q], then seconds [W, L, groups]. Experts may be groups."""

    def __init__(self, model: TierModel) -> None:
        from scipy import sparse

        ways = model.ways
        self.model, (L, E, _) = model, model.shape
        self.Q, self.W = int(ways.class_Y.max()) + 1, len(model.weight_W)
        self.HQ = int(ways.class_H.max()) + 1
        self.UQ = int(ways.class_U.max()) + 1
        self.columns = L * E * self.Q
        self.groups = [group for group in (WORK, TRAFFIC) if (ways.group_H == group).any()]
        group_of = [int(ways.group_H[ways.class_H == one][0]) for one in range(self.HQ)]
        self.group_of = [self.groups.index(group) for group in group_of]
        unit_QHC = self._class_uses()
        seconds = self.W * L * len(self.groups)
        self.cost = np.concatenate([np.zeros(self.columns), np.repeat(model.weight_W, L * len(self.groups))])
        ones = sparse.kron(sparse.identity(L * E), np.ones((1, self.Q)))
        self.sums: Any = sparse.csr_array(sparse.hstack([ones, sparse.csr_array((L * E, seconds))]))
        rows = [sparse.hstack([self._capacity_rows(), sparse.csr_array((self.UQ, seconds))])]
        rows += [self._chain_rows(unit_QHC, w, layer) for w in range(self.W) for layer in range(L)]
        self.upper = sparse.vstack(rows).tocsr()
        capacity = np.array([ways.capacity_U[ways.class_U == one].sum() for one in range(self.UQ)])
        self.is_open = np.isfinite(capacity)
        self.unit = model.bytes_L.max()
        self.limit = np.concatenate(
            [np.where(self.is_open, capacity, 0) / self.unit, np.zeros(self.upper.shape[0] - self.UQ)]
        )
        self.upper = (
            sparse.diags_array(np.concatenate([self.is_open / self.unit, np.ones(self.upper.shape[0] - self.UQ)]))
            @ self.upper
        )

    def _class_uses(self) -> Float:
        """Uses of chain classes by way classes: means over both."""
        ways = self.model.ways
        mean = np.zeros((self.Q, self.HQ, ways.use_YHC.shape[2]))
        for q in range(self.Q):
            one = ways.use_YHC[ways.class_Y == q].mean(axis=0)
            for h in range(self.HQ):
                mean[q, h] = one[ways.class_H == h].mean(axis=0)
        return mean

    def _capacity_rows(self) -> Any:
        from scipy import sparse

        ways, (L, E, _) = self.model.ways, self.model.shape
        pool_of_Q = [int(ways.class_U[ways.pool_Y[ways.class_Y == q][0]]) for q in range(self.Q)]
        assert self.model.members_LE is not None
        bytes_LE = self.model.members_LE * self.model.bytes_L[:, None]
        table = np.zeros((self.UQ, L, E, self.Q))
        for q, pool in enumerate(pool_of_Q):
            table[pool, :, :, q] = bytes_LE
        return sparse.csr_array(table.reshape(self.UQ, -1))

    def _chain_rows(self, unit_QHC: Float, w: int, layer: int) -> Any:
        """Loads of a layer's chain classes, minus the seconds of their groups."""
        from scipy import sparse

        L, E, _ = self.model.shape
        load_HEQ = np.einsum("ec,qhc->heq", self.model.cost_WLEC[w, layer], unit_QHC)
        start = layer * E * self.Q
        row, column = np.nonzero(load_HEQ.reshape(self.HQ, -1))
        value = load_HEQ.reshape(self.HQ, -1)[row, column]
        second = self.columns + (w * L + layer) * len(self.groups) + np.array(self.group_of)
        row = np.concatenate([row, np.arange(self.HQ)])
        column = np.concatenate([column + start, second])
        value = np.concatenate([value, -np.ones(self.HQ)])
        return sparse.csr_array((value, (row, column)), shape=(self.HQ, len(self.cost)))

    def shares(self, x: Float) -> Float:
        L, E, _ = self.model.shape
        return np.clip(x[: self.columns], 0, 1).reshape(L, E, self.Q)

    def even_shares(self) -> Float:
        L, E, _ = self.model.shape
        return np.full((L, E, self.Q), 1 / self.Q)

    def multipliers(self, marginals: Float, unit_s: float) -> Multipliers:
        """The solver's duals, cleaned: not negative, of the right sums, spread over the members of each class."""
        ways, L = self.model.ways, self.model.shape[0]
        price_Q = np.maximum(-marginals[: self.UQ], 0) * self.is_open * unit_s / self.unit
        price_U = np.where(np.isfinite(ways.capacity_U), price_Q[ways.class_U], 0.0)
        raw = np.maximum(-marginals[self.UQ :], 0).reshape(self.W, L, self.HQ)
        size_H = np.bincount(ways.class_H)[ways.class_H]
        chain_WLH = raw[:, :, ways.class_H] / size_H
        even_WLH = even_multipliers(self.model).chain_WLH
        for group in (WORK, TRAFFIC):
            mine = ways.group_H == group
            total = chain_WLH[:, :, mine].sum(axis=2, keepdims=True)
            scaled = chain_WLH[:, :, mine] * (self.model.weight_W[:, None, None] / np.where(total > 0, total, 1))
            chain_WLH[:, :, mine] = np.where(total > 0, scaled, even_WLH[:, :, mine])
        return Multipliers(chain_WLH=chain_WLH, price_U=price_U)
