"""MoETuner's two integer programmes, as published (Go and Mahajan 2025, arXiv:2502.06643), with PuLP.

1. Per layer, cluster experts evenly by load: x[e,c] binary, minimise sum over clusters of |load - mean|.
2. Clusters to GPUs, all layers together: z[l,c,g] one to one; minimise, over layers, the largest traffic of two GPUs,
   T[c,c'] z[l,c,g] z[l+1,c',g'] / bandwidth[g,g'] linearised.
Every cluster here has E / G experts: engine maps need equal slots. Shapes: L layers, E experts, G GPUs.
"""

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from .run import solve_milp

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
MAX_PRODUCTS = 400_000  # linearised products; a guard against programmes that do not fit in memory
GAP_REL = 0.025  # the paper's tolerance


def cluster_layer(weight_E: Float, gpus: int, *, time_limit_s: float, start_E: Integer) -> Integer:
    """First programme: the cluster of each expert; `start_E` is returned if nothing better is found in time."""
    E = len(weight_E)
    mean = float(weight_E.sum()) / gpus
    programme = pulp.LpProblem("moetuner_clusters", pulp.LpMinimize)
    x = {(e, c): programme.add_variable(f"x_{e}_{c}", cat="Binary") for e in range(E) for c in range(gpus)}
    off = [programme.add_variable(f"d_{c}", lowBound=0) for c in range(gpus)]
    programme += pulp.LpAffineExpression([(d, 1 / mean) for d in off])
    for e in range(E):
        programme += pulp.LpAffineExpression([(x[e, c], 1) for c in range(gpus)]) == 1
    for c in range(gpus):
        programme += pulp.LpAffineExpression([(x[e, c], 1) for e in range(E)]) == E // gpus
        load = [(x[e, c], float(weight_E[e])) for e in range(E)]
        programme += pulp.LpAffineExpression([*load, (off[c], -1)]) <= mean
        programme += pulp.LpAffineExpression([*load, (off[c], 1)]) >= mean
    load_C = np.bincount(start_E, weights=weight_E, minlength=gpus)
    start = {f"x_{e}_{c}": 1.0 for e, c in enumerate(start_E.tolist())}
    start |= {f"d_{c}": abs(float(load) - mean) for c, load in enumerate(load_C)}
    result = solve_milp(programme, time_limit_s=time_limit_s, gap_rel=GAP_REL, start=start)
    if result.values is None:
        return start_E
    return np.array([max(range(gpus), key=lambda c: result.values[f"x_{e}_{c}"]) for e in range(E)])  # type: ignore[index]


def assign_clusters(traffic_LCC: Float, cost_GG: Float, *, time_limit_s: float) -> Integer:
    """Second programme: [L, C] GPU of each cluster.

    Args:
        traffic_LCC: [L - 1, C, C] tokens from clusters of a layer to those of the next.
        cost_GG: seconds per token between GPUs (1 / bandwidth), 0 on the diagonal.
        time_limit_s: seconds after which the best assignment so far is returned.

    Raises:
        ValueError: if the products are too many to write down.
    """
    L, G = len(traffic_LCC) + 1, len(cost_GG)
    products = (L - 1) * G**4
    if products > MAX_PRODUCTS:
        raise ValueError(
            f"MoETuner's second programme has (L-1) G^4 = {products} products for {L} layers on {G} GPUs, "
            f"more than {MAX_PRODUCTS}; use --solver search"
        )
    programme = pulp.LpProblem("moetuner_gpus", pulp.LpMinimize)
    z = {
        (layer, c, g): programme.add_variable(f"z_{layer}_{c}_{g}", cat="Binary")
        for layer in range(L)
        for c in range(G)
        for g in range(G)
    }
    tail = [programme.add_variable(f"tail_{layer}", lowBound=0) for layer in range(L - 1)]
    programme += pulp.LpAffineExpression([(t, 1) for t in tail])
    for layer in range(L):
        for i in range(G):
            programme += pulp.LpAffineExpression([(z[layer, i, g], 1) for g in range(G)]) == 1
            programme += pulp.LpAffineExpression([(z[layer, c, i], 1) for c in range(G)]) == 1
    for c in range(1, G):  # GPUs of the first layer may be numbered freely where links are alike
        if np.allclose(cost_GG[~np.eye(G, dtype=bool)], cost_GG[0, 1] if G > 1 else 0):
            programme += z[0, c, c] == 1
    for layer in range(L - 1):
        _pair_rows(
            programme, z, tail[layer], layer, traffic_LCC[layer] / max(float(traffic_LCC[layer].sum()), 1), cost_GG
        )
    start = {f"z_{layer}_{c}_{c}": 1.0 for layer in range(L) for c in range(G)}
    result = solve_milp(programme, time_limit_s=time_limit_s, gap_rel=GAP_REL, start=start)
    if result.values is None:
        return np.tile(np.arange(G), (L, 1))
    values = result.values
    return np.array(
        [[max(range(G), key=lambda g: values[f"z_{layer}_{c}_{g}"]) for c in range(G)] for layer in range(L)]
    )


def _pair_rows(
    programme: pulp.LpProblem,
    z: dict[tuple[int, int, int], pulp.LpVariable],
    tail: pulp.LpVariable,
    layer: int,
    share_CC: Float,
    cost_GG: Float,
) -> None:
    """tail >= traffic(g, g') for every pair; w[c,c'] >= z + z' - 1 carries the product."""
    G = len(cost_GG)
    scale = float(cost_GG.max()) or 1.0
    for g in range(G):
        for h in range(G):
            if g == h:
                continue
            terms = []
            for c in range(G):
                for d in range(G):
                    both = programme.add_variable(f"w_{layer}_{g}_{h}_{c}_{d}", lowBound=0)
                    programme += (
                        pulp.LpAffineExpression([(both, 1), (z[layer, c, g], -1), (z[layer + 1, d, h], -1)]) >= -1
                    )
                    terms.append((both, -float(share_CC[c, d]) * float(cost_GG[g, h]) / scale))
            programme += pulp.LpAffineExpression([(tail, 1), *terms]) >= 0
