"""Bundles: the distinct expert sets that tokens use at a layer, with how many tokens use each.

Shapes: B bundles, K experts per token, E experts, X items (experts, or copies of experts).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy import sparse

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Bundles:
    """Distinct sets with counts.

    Args:
        item_BK: members of each set in rising order, -1 where a set is smaller than K.
        count_B: tokens that use the set, float64.
    """

    item_BK: Integer
    count_B: Float

    @property
    def tokens(self) -> float:
        return float(self.count_B.sum())

    @property
    def size_B(self) -> Integer:
        return np.asarray((self.item_BK >= 0).sum(axis=1))

    def incidence(self, items: int) -> "sparse.csr_array":
        """0/1 matrix [B, items]."""
        from scipy import sparse

        row, k = np.nonzero(self.item_BK >= 0)
        return sparse.csr_array((np.ones(len(row)), (row, self.item_BK[row, k])), shape=(len(self.count_B), items))

    def coactivation(self, items: int) -> Float:
        """[items, items] tokens that use both; the diagonal is 0."""
        from scipy import sparse

        used = self.incidence(items)
        both = np.asarray((used.T @ sparse.diags_array(self.count_B) @ used).todense(), np.float64)
        np.fill_diagonal(both, 0)
        return both

    def project(self, part_of: Integer) -> "Bundles":
        """Bundles of the parts that items belong to; -1 in `part_of` drops the item."""
        padded = np.append(part_of, -1)
        return unique_sets(padded[self.item_BK], self.count_B)


def unique_sets(item_TK: NDArray[np.integer[Any]], count_T: Float | None = None) -> Bundles:
    """Distinct non-empty sets of the rows; -1 marks an empty slot, an item named twice counts once."""
    ordered = np.sort(item_TK.astype(np.int64), axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    ordered.sort(axis=1)
    count_T = np.ones(len(ordered)) if count_T is None else count_T
    keep = ordered[:, -1] >= 0
    ordered, count_T = ordered[keep], count_T[keep]
    if not len(ordered):
        return Bundles(ordered, count_T)
    key_T = _row_keys(ordered)
    _, first, inverse = np.unique(key_T, return_index=True, return_inverse=True)
    return Bundles(ordered[first], np.bincount(inverse.ravel(), weights=count_T).astype(np.float64))


def _row_keys(ordered: Integer) -> NDArray[np.generic]:
    """One sortable key per row: an exact integer if the ids are small enough, else the bytes of the row."""
    base = int(ordered.max()) + 2
    K = ordered.shape[1]
    if base**K < 2**62:
        return np.asarray((ordered + 1) @ (base ** np.arange(K, dtype=np.int64)))
    packed = np.ascontiguousarray(ordered.astype(np.int32))
    return packed.view(np.dtype((np.void, packed.dtype.itemsize * K))).ravel()
