"""GroupState: items in groups of equal size, the fan-out of bundles over them, and the exact change of every swap.

Fan-out is sum_b c_b * (groups that bundle b touches). For items x in g and y in h,
  change(x, y) = add[x, h] - drop[x] + add[y, g] - drop[y] + both[x, y] + both[y, x],
  add[x, h]  = sum of c_b over bundles with x that do not touch h,
  drop[x]    = sum of c_b over bundles whose only item in x's group is x,
  both[x, y] = that of drop[x] over bundles that also hold y (those do not change at all).
After a swap only the bundles with one of the two items are counted anew.
Shapes: B bundles, X items, A groups.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy import sparse

Single = NDArray[np.float32]
Integer = NDArray[np.int64]
Boolean = NDArray[np.bool_]
DENSE_CELLS = 1 << 22  # 16 MiB as float32: memory against sparse products. Untried elsewhere


class GroupState:
    """Counts and swap changes of one partition; float32 counts are exact up to 2^24 tokens.

    Args:
        used_BX: 0/1 incidence of bundles and items.
        count_B: tokens that use each bundle.
        group_X: group of each item.
        num_groups: A; groups without items are allowed.
    """

    def __init__(
        self, used_BX: "sparse.csr_array", count_B: NDArray[np.float64], group_X: Integer, num_groups: int
    ) -> None:
        self.is_dense = used_BX.shape[0] * used_BX.shape[1] <= DENSE_CELLS
        used_BX = used_BX.astype(np.float32)
        self.sparse_BX = used_BX.tocsr()
        self.used_BX: Any = self.sparse_BX.toarray() if self.is_dense else self.sparse_BX
        self.rows_of_item = used_BX.tocsc()
        self.count_B = count_B.astype(np.float32)
        self.group_X = group_X.astype(np.int64).copy()
        self.A, self.X = num_groups, used_BX.shape[1]
        member_XA = np.zeros((self.X, self.A), np.float32)
        member_XA[np.arange(self.X), self.group_X] = 1
        self.touch_BA = np.asarray(self.sparse_BX @ member_XA)
        self.add_XA = np.zeros((self.X, self.A))
        self.lone_XA = np.zeros((self.X, self.A))
        self.both_XX = np.zeros((self.X, self.X))
        self._count(np.arange(len(count_B)), +1)

    @property
    def fanout(self) -> float:
        """Sum over bundles of tokens * touched groups."""
        return float(self.count_B.astype(np.float64) @ (self.touch_BA > 0.5).sum(axis=1))

    def change_XX(self) -> NDArray[np.float64]:
        """Change of the fan-out by swapping each two items; swaps within a group are 0."""
        drop_X = self.lone_XA[np.arange(self.X), self.group_X]
        one_XX = self.add_XA[:, self.group_X] - drop_X[:, None] + self.both_XX
        change_XX = one_XX + one_XX.T
        change_XX[self.group_X[:, None] == self.group_X] = 0
        return change_XX

    def swap(self, x: int, y: int) -> None:
        """Exchange the groups of two items."""
        g, h = int(self.group_X[x]), int(self.group_X[y])
        if g == h:
            return
        rows = self._rows_with_any(x, y)
        self._count(rows, -1)
        toward_h = self._column(rows, x) - self._column(rows, y)
        self.touch_BA[rows, g] -= toward_h
        self.touch_BA[rows, h] += toward_h
        self.group_X[x], self.group_X[y] = h, g
        self._count(rows, +1)

    def _rows_with_any(self, x: int, y: int) -> Integer:
        start = self.rows_of_item.indptr
        rows_x = self.rows_of_item.indices[start[x] : start[x + 1]]
        rows_y = self.rows_of_item.indices[start[y] : start[y + 1]]
        return np.union1d(rows_x, rows_y)

    def _column(self, rows: Integer, item: int) -> Single:
        """Which of the bundles hold the item."""
        start = self.rows_of_item.indptr
        return np.isin(rows, self.rows_of_item.indices[start[item] : start[item + 1]]).astype(np.float32)

    def _count(self, rows: Integer, sign: int) -> None:
        """Add (or take away) what these bundles contribute to add, lone and both."""
        from scipy import sparse

        if not len(rows):
            return
        is_dense = self.is_dense and len(rows) < len(self.count_B)
        used: Any = self.used_BX[rows] if is_dense else self.sparse_BX[rows]
        weight = sign * self.count_B[rows, None]
        touch = self.touch_BA[rows]
        none, lone = (touch < 0.5) * weight, (touch > 0.5) & (touch < 1.5)
        self.add_XA += used.T @ none
        self.lone_XA += used.T @ (lone * weight)
        if is_dense:
            lone_BX = used * lone[:, self.group_X]
            self.both_XX += lone_BX.T @ (used * weight)
        else:
            entry_row = np.repeat(np.arange(len(rows)), np.diff(used.indptr))
            value = used.data * lone[entry_row, self.group_X[used.indices]]
            lone_sparse = sparse.csr_array((value, used.indices, used.indptr), shape=used.shape)
            weighted = sparse.csr_array(
                (used.data * weight.ravel()[entry_row], used.indices, used.indptr), shape=used.shape
            )
            self.both_XX += (lone_sparse.T @ weighted).toarray()
