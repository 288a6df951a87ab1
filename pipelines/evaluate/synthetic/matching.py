"""One-to-one matching of true features and latents, with the largest total cosine.

The matching is exact: shortest augmenting paths with dual variables (Crouse 2016, "On implementing
2D rectangular assignment algorithms"), O(n^2 m) for n rows and m columns. One thread does
everything in one order, so ties are settled the same way each time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache

use_numba_cache()

from numba import njit  # noqa: E402


def match(score: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the column of each row in a one-to-one matching with the largest total score.

    >>> match(np.array([[0.9, 0.8], [0.8, 0.1]], np.float32)).tolist()
    [1, 0]

    Args:
        score: float32 [n, m], finite.

    Returns:
        int64 [n]; -1 for a row without a column, which exist if n > m.
    """
    n, m = score.shape
    if n <= m:
        return assigned(score)
    rows = assigned(np.ascontiguousarray(score.T))  # [m], the row of each column
    found = np.full(n, -1, np.int64)
    found[rows] = np.arange(m)
    return found


@njit(cache=True)
def assigned(score: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the column of each row, int64 [n], of a score [n, m] with n <= m."""
    n, m = score.shape
    u, v = np.zeros(n), np.zeros(m)  # dual variables: u + v <= cost = -score
    column_of = np.full(n, -1, np.int64)
    row_of = np.full(m, -1, np.int64)
    path = np.empty(m, np.int64)  # the row from which a column was reached
    shortest = np.empty(m)
    seen_rows, seen_columns = np.zeros(n, np.bool_), np.zeros(m, np.bool_)
    for start in range(n):
        shortest[:] = np.inf
        seen_rows[:] = False
        seen_columns[:] = False
        row, end, length = start, -1, 0.0
        while end < 0:
            seen_rows[row] = True
            best, lowest = -1, np.inf
            for column in range(m):
                if seen_columns[column]:
                    continue
                through = length - score[row, column] - u[row] - v[column]
                if through < shortest[column]:
                    shortest[column] = through
                    path[column] = row
                if shortest[column] < lowest or (
                    shortest[column] == lowest and row_of[column] < 0 and row_of[best] >= 0
                ):
                    lowest = shortest[column]
                    best = column
            length = lowest
            seen_columns[best] = True
            if row_of[best] < 0:
                end = best
            else:
                row = row_of[best]
        u[start] += length
        for other in range(n):
            if seen_rows[other] and other != start:
                u[other] += length - shortest[column_of[other]]
        for column in range(m):
            if seen_columns[column]:
                v[column] -= length - shortest[column]
        column = end
        while True:
            row = path[column]
            row_of[column] = row
            column, column_of[row] = column_of[row], column
            if row == start:
                break
    return column_of
