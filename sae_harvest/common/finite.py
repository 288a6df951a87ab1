"""Checks that rows are finite. No harvest writes infinity or NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import DamagedError


def require_finite(
    x: npt.NDArray[Any],
    place: str,
    site: str,
    first_row: int,
    wanted: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Raise `DamagedError`, naming the first row that holds infinity or NaN.

    Args:
        x: rows of a site, float16 or float32 [rows, width].
        place: place of the store, for the message.
        site: name of the site, for the message.
        first_row: number of the first row in the store.
        wanted: mask of the rows to check, bool [rows]; None for all.
    """
    if all_finite(x):
        return
    bad = ~np.isfinite(x).all(axis=1)
    if wanted is not None:
        bad &= wanted
    if bad.any():
        raise DamagedError(
            f"{place} holds values of {site} that are not finite, in row "
            f"{first_row + int(bad.argmax())}; run `harvest verify`."
        )


def all_finite(x: npt.NDArray[Any]) -> bool:
    """True if x, float16 or float32, holds neither infinity nor NaN; faster than `np.isfinite`.

    Read as integers, numbers that are not finite are the largest of their sign.
    """
    if x.size == 0:
        return True
    size = x.dtype.itemsize
    infinity = int(np.array(np.inf, x.dtype).view(f"u{size}"))
    sign = 1 << (8 * size - 1)
    positive, negative = x.view(f"i{size}").max(), x.view(f"u{size}").max()
    return int(positive) < infinity and int(negative) < infinity + sign
