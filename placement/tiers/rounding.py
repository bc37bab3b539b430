"""From the relaxation's shares to one home for each expert: whole, within every memory, spread over alike machines.

Shapes: L layers, E experts, Y ways, H chains, U memory pools, Q classes, W scenarios.
"""

import numpy as np
from numpy.typing import NDArray

from .model import TierModel
from .relaxation import Relaxed, priced_LEY

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
ROUNDING_SLACK = 1 + 1e-12  # of a capacity, for sums of bytes that are rounded


def round_shares(model: TierModel, relaxed: Relaxed) -> Integer:
    """Way of each expert [L, E]; padding experts get way 0.

    Experts with the largest share of one class are placed first, each on the way of its best class that leaves its
    layer quickest and still has room. A class without room passes its experts on to the next cheapest one.

    Args:
        model: what is placed where.
        relaxed: shares and multipliers; the latter rank the classes that are not the first choice.
    """
    L, E, _ = model.shape
    ways = model.ways
    wish_LEY = relaxed.share_LEQ[:, :, ways.class_Y]
    price_LEY = priced_LEY(model, relaxed.multipliers)
    left_U = ways.capacity_U * ROUNDING_SLACK
    way_LE = np.zeros((L, E), np.int64)
    load_LWH = np.zeros((L, len(model.weight_W), len(ways.group_H)))
    certain_LE = relaxed.share_LEQ.max(axis=2)
    certain_LE[np.arange(E) >= model.experts_L[:, None]] = -1
    order = np.argsort(-certain_LE, axis=1, kind="stable")
    for rank in range(E):
        for layer in range(L):
            expert = int(order[layer, rank])
            if rank >= model.experts_L[layer]:
                continue
            has_room_Y = left_U[ways.pool_Y] >= model.bytes_L[layer]
            if not has_room_Y.any():
                raise ValueError("no memory has room for another expert; capacities are too small to divide")
            cost_WYH = np.einsum("wc,yhc->wyh", model.cost_WLEC[:, layer, expert], ways.use_YHC)
            after_Y = model.layer_seconds((load_LWH[layer][:, None] + cost_WYH).swapaxes(0, 1))
            key_Y = np.where(has_room_Y, np.round(wish_LEY[layer, expert], 2), -np.inf)
            tied_Y = key_Y >= key_Y.max()
            if key_Y.max() <= 0:
                tied_Y = has_room_Y & (
                    price_LEY[layer, expert] <= price_LEY[layer, expert][has_room_Y].min() * 1.000001
                )
            spread_Y = after_Y + 1e-3 * (load_LWH[layer][:, None] * cost_WYH).sum(axis=(0, 2)) / max(
                after_Y.max(), 1e-300
            )
            chosen = int(np.where(tied_Y, spread_Y, np.inf).argmin())
            way_LE[layer, expert] = chosen
            left_U[ways.pool_Y[chosen]] -= model.bytes_L[layer]
            load_LWH[layer] += cost_WYH[:, chosen]
    return way_LE
